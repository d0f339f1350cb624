"""Measurements that end in a table with its command, versions and machine."""
