"""Models that the studies train."""
