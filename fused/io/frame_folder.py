"""A folder of images, as a video."""

IMAGE_SUFFIXES: frozenset[str] = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp"))
"""Suffixes of images in a folder, in lower case; the case of a file's name does not matter."""
