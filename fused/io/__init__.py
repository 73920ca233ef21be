"""Files: videos, checkpoints, and atomic writes."""
