"""Files: videos, checkpoints, and writing whole or not at all."""
