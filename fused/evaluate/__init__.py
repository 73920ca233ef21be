"""Evaluation of a trained model on a list of videos: `python -m fused.evaluate`."""
