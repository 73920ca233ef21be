"""The videos of a folder that are nearest to a text: `python -m fused.search`, in Python `search`.

    from fused.search import search
    for found in search(model, "videos", "a seven moves left"):
        print(found.video, found.cosine)
"""

from fused.search.search import Found, search

__all__ = ["Found", "search"]
