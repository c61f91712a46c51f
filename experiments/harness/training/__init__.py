"""The training loop, its checkpoints, schedules, metrics, and what was compiled."""
