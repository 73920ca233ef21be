"""Softmax attention by name: what computes it, where that can run, and in which dtypes.

    attend(q, k, v) = softmax(q k^T / sqrt(d)) v

- `naive`      the (L, L) matrix written out
- `sdpa`       PyTorch's choice, which depends on the box, the input and the settings: it leaves out cuDNN where
               `torch.use_deterministic_algorithms` is on
- `cudnn`      cuDNN's kernel and no other
- `flash`      FlashAttention 2 and no other
- `efficient`  the memory-efficient kernel that came from xFormers, and no other
"""

import contextlib
import warnings
from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fused import backends
from fused.errors import BackendError

KINDS = ("naive", "sdpa", "cudnn", "flash", "efficient")
PINNED = {
    "cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION
}  # fmt: skip
_LOW = (torch.float16, torch.bfloat16)
_REFUSALS = ("No available kernel", "No viable backend")  # how PyTorch's errors begin when a pinned kernel declines


def dtypes(kind: str) -> tuple[torch.dtype, ...]:
    """Return the dtypes of q, k and v that are allowed; under autocast that is autocast's dtype."""
    if kind in ("cudnn", "flash"):
        return _LOW
    return (*_LOW, torch.float32) if kind == "efficient" else (*_LOW, torch.float32, torch.float64)


def unavailable(kind: str, device: torch.device | str) -> str | None:
    """Return None if `kind` can run on `device`, else one sentence: why not, and what to do."""
    if kind not in KINDS:
        raise ValueError(f"attention is {kind!r}; allowed: one of {', '.join(KINDS)}")
    reason = backends.unavailable("torch", device)
    if reason or kind not in PINNED:
        return reason
    where = torch.device(device)
    if where.type != "cuda":
        return f"{kind} attention runs on CUDA only, and this is {where.type}: use a GPU, or attention='sdpa'."
    return _refusal(kind, str(where))


@cache
def _refusal(kind: str, device: str) -> str | None:
    """Return the error of a small call, None if it runs. Only a call can tell: chips, drivers and builds of PyTorch differ."""
    x = torch.zeros(1, 1, 16, 64, dtype=torch.float16, device=device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with only(kind, x.device):
                attend(x, x, x, kind)
        except RuntimeError as error:
            return " ".join([str(error), *(str(w.message) for w in caught)])
    return None


@contextlib.contextmanager
def only(kind: str, device: torch.device) -> Iterator[None]:
    """Allow PyTorch's attention only `kind`, for the time within. Raises BackendError where that cannot run.

    The host decides when a kernel is launched, so a CUDA graph keeps the kernel with which it was captured; a backward
    pass has the kernel of its forward pass, wherever it runs. PyTorch refuses cuDNN under deterministic algorithms; who
    asks for it by name gets it all the same.
    """
    if kind not in PINNED:
        yield
        return
    if device.type != "cuda":
        raise BackendError(f"attention {kind!r} cannot run here. {unavailable(kind, device)}")
    relaxed = kind == "cudnn" and torch.are_deterministic_algorithms_enabled()
    relaxed = relaxed and not torch.is_deterministic_algorithms_warn_only_enabled()
    if relaxed:
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with sdpa_kernel(PINNED[kind]):
            yield
    except RuntimeError as error:
        if not any(words in str(error) for words in _REFUSALS):
            raise
        why = "this GPU, this build of PyTorch or these sizes do not suit it; use attention='sdpa'"
        raise BackendError(f"attention {kind!r} cannot run here: {why}. PyTorch's reasons stand in its warnings.") from error
    finally:
        if relaxed:
            torch.use_deterministic_algorithms(True)


def attend(
    q: Float[Tensor, "B heads L d"], k: Float[Tensor, "B heads M d"], v: Float[Tensor, "B heads M d"], kind: str = "sdpa"
) -> Float[Tensor, "B heads L d"]:
    """Return softmax(q k^T / sqrt(d)) v over all tokens, no mask. For a pinned kind call it within `only`.

    Raises ValueError for a dtype that the kind does not take.
    """
    if q.dtype not in dtypes(kind):
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes(kind))
        raise ValueError(f"attention {kind!r} takes {names}, got {q.dtype}; use autocast, or attention='sdpa'")
    if kind != "naive":
        return F.scaled_dot_product_attention(q, k, v)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return scores.softmax(dim=-1) @ v
