"""The run: its directory, checkpoints, schedule, progress and end."""
