"""DECIDE: x_TD -> Routing."""
