"""Grouped products, several ways: a plain reference, and a fast path for each kind of device."""
