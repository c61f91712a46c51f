"""Runs that others publish, and ours, by the same forms."""
