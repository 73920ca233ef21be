"""RMSNorm over groups of channels, with a gate before or after it."""

MAX_WIDTH = 8192
"""The most channels of a group that the kernels take."""
