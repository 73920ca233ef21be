"""The check of `seq_idx`, which numbers the sequences, or segments, that are packed into a row of tokens."""

import torch
from torch import Tensor


def check_seq_idx(op: str, seq_idx: object, batch: int, length: int, device: torch.device) -> None:
    """Raise unless `seq_idx` is an int32 or int64 tensor (batch, length) on `device` whose numbers ascend in every row.

    TypeError for a wrong type or dtype, ValueError for the rest. The order is not looked at where a compiler traces or a CUDA
    graph is captured: a number that comes again after another one then begins no new segment.
    """
    if not isinstance(seq_idx, Tensor):
        raise TypeError(f"{op}: seq_idx must be an int32 or int64 tensor (B={batch}, L={length}), got {type(seq_idx).__name__}")
    if seq_idx.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: seq_idx must be int32 or int64, got {seq_idx.dtype}")
    if seq_idx.shape != (batch, length):
        raise ValueError(f"{op}: seq_idx must have shape (B={batch}, L={length}), got {tuple(seq_idx.shape)}")
    if seq_idx.device != device:
        raise ValueError(f"{op}: seq_idx is on {seq_idx.device}, every tensor must be on {device} like the first one")
    if torch.compiler.is_compiling() or seq_idx.is_meta or (seq_idx.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    descents = (seq_idx[:, 1:] < seq_idx[:, :-1]).nonzero()
    if len(descents):
        row, place = descents[0].tolist()
        before, after = seq_idx[row, place : place + 2].tolist()
        where = f"at token {place + 1} of row {row}"
        raise ValueError(f"{op}: seq_idx must ascend in every row, got {before} and then {after} {where}")
