"""Measurements that end in a table with its command, versions and machine."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
