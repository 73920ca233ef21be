"""Questions about a video file, answered by a Vamba or a BIMBA: `python -m fused.chat`."""
