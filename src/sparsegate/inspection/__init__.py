"""Inspection: what the experts do."""
