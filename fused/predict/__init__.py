"""The most likely classes of video files: `python -m fused.predict`. In Python it is `fused.classify`."""
