"""The layer timed against a dense one, against its peers, and against what the machine can do at most."""
