"""Checks of what a compressor is given."""

from torch import Tensor


def check_inputs(tokens: Tensor, queries: Tensor, d_model: int) -> None:
    """Raise ValueError for tokens and queries that the compressor cannot take, naming the argument."""
    shapes = {"tokens": ("B, frames, rows, columns", 5, tokens), "queries": ("B, frames, queries of a frame", 4, queries)}
    for name, (letters, dimensions, x) in shapes.items():
        shape = tuple(x.shape)
        if x.dim() != dimensions or shape[-1] != d_model:
            raise ValueError(f"BimbaCompressor: {name} must have shape ({letters}, d_model={d_model}), got {shape}")
        if 0 in shape[1:-1]:
            raise ValueError(f"BimbaCompressor: {name} must be at least one for every clip, got shape {shape}")
    if tokens.shape[0] != queries.shape[0]:
        raise ValueError(
            f"BimbaCompressor: queries must be of as many clips as tokens, {tokens.shape[0]}, got {queries.shape[0]}"
        )
    if (tokens.dtype, tokens.device) != (queries.dtype, queries.device):
        raise ValueError(
            f"BimbaCompressor: queries must be {tokens.dtype} on {tokens.device} like tokens, "
            f"got {queries.dtype} on {queries.device}"
        )
