"""The kinds of a model's arguments, checked before anything looks into them; shapes are checked where they are known."""

import torch
from torch import Tensor

from fused.models.vamba.cache import VambaCache

INTEGERS = (torch.int64, torch.int32)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
KINDS: dict[str, tuple[tuple[torch.dtype, ...], str]] = {
    "input_ids": (INTEGERS, "int64 or int32"),
    "inputs_embeds": (FLOATS, "floating point"),
    "video": (FLOATS, "floating point"),
    "position_ids": (INTEGERS, "int64 or int32"),
    "cross_attention_mask": ((torch.bool,), "bool, True where a text token may read"),
    "encoder_position_ids": (INTEGERS, "int64 or int32"),
    "labels": (INTEGERS, "int64 or int32"),
}


def check_kinds(cache: object, **given: object) -> None:
    """Raise TypeError, which names it, for an argument that is neither None nor a tensor of a dtype in KINDS, or no cache."""
    for name, value in given.items():
        dtypes, allowed = KINDS[name]
        if value is not None and not (isinstance(value, Tensor) and value.dtype in dtypes):
            found = value.dtype if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise TypeError(f"{name} is {found}; allowed: a tensor, {allowed}")
    if cache is not None and not isinstance(cache, VambaCache):
        raise TypeError(f"cache is a {type(cache).__name__}; allowed: a VambaCache, which use_cache and encode_video give")
