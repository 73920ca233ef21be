"""The autocast of a device, also of one that has none, and a context without it for operators that choose their own dtypes."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

# asked once, because Dynamo of PyTorch 2.8 to 2.10 cannot trace the question
AUTOCAST_DEVICES = frozenset(
    kind for kind in ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "xla") if torch.amp.is_autocast_available(kind)
)
_NO_CONTEXT: AbstractContextManager[object] = nullcontext()


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context without autocast on `device`, also on devices that have none."""
    kind = device.type
    if kind in AUTOCAST_DEVICES and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return _NO_CONTEXT


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return autocast's dtype on `device`; None where it is off, or where the device has none."""
    kind = device.type
    if kind in AUTOCAST_DEVICES and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def autocast_of_graph(device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    """Return a function that makes a context with the autocast that is on now on `device`, for work that a CUDA graph holds.

    It caches no casts of weights: they would be freed at the context's end, and the graph would go on reading them.
    """
    kind = device.type
    on, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return partial(torch.autocast, kind, dtype, on, cache_enabled=False)
