"""Features of videos by a trained model, in a file: `python -m fused.features`, in Python `extract`.

    from fused.features import extract
    extract(model, "videos").save("features.safetensors")
"""

from fused.features.extract import Features, extract

__all__ = ["Features", "extract"]
