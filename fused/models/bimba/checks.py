"""Checks of what a compressor is given."""

import torch
from torch import Tensor

from fused.runtime.autocast import autocast_dtype
from fused.runtime.checks import check_tensor

OP = "BimbaCompressor"


def check_inputs(tokens: Tensor, queries: Tensor, d_model: int, *, same_device: bool = True) -> None:
    """Raise TypeError or ValueError for tokens and queries that the compressor cannot take, naming the argument."""
    check_tensor(OP, "tokens", tokens, "B F H W C", {"C": d_model}, None)
    check_tensor(OP, "queries", queries, "B G Q C", {"C": d_model}, None)
    for name, x in (("tokens", tokens), ("queries", queries)):
        if 0 in x.shape[1:-1]:
            raise ValueError(f"{OP}: {name} must be at least one for every clip, got shape {tuple(x.shape)}")
    if tokens.shape[0] != queries.shape[0]:
        raise ValueError(f"{OP}: queries must be of as many clips as tokens, {tokens.shape[0]}, got {queries.shape[0]}")
    if tokens.dtype != queries.dtype:
        raise ValueError(f"{OP}: queries must be {tokens.dtype} like tokens, got {queries.dtype}")
    if same_device and tokens.device != queries.device:
        raise ValueError(f"{OP}: queries must be on {tokens.device} like tokens, got {queries.device}")


def check_parameter(weight: Tensor, queries: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError unless a layer that computes in `dtype` where the queries are can multiply by its `weight`."""
    if weight.device != queries.device:
        raise ValueError(f"{OP}: queries are on {queries.device}; allowed: {weight.device}, where the parameters are")
    if weight.dtype != dtype and autocast_dtype(queries.device) is None:
        computed = "" if queries.dtype == dtype else f", which fp32 computes in {dtype}"
        raise ValueError(
            f"{OP}: queries are {queries.dtype}{computed}, parameters {weight.dtype}; allowed: one dtype, or torch.autocast"
        )
