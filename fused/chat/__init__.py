"""Questions about a video file, answered by a Vamba: `python -m fused.chat`."""
