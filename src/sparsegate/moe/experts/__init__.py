"""COMPUTE: x_TD, Routing -> y_TD."""
