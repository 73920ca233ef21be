"""The layouts in which VideoMamba's weights are published: what is wrapped around them, and what stands before their names.

- bare, or under "model", "module" or "state_dict", beside a trainer's entries (optimizer, epoch, args ...)
- names behind "module." (DDP), "_orig_mod." (torch.compile), "vision_encoder.", "backbone.", "encoder.", "student."
- beside other networks: the teacher of masked pretraining, the text encoder and projections of video-text models
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from fused.io.checkpoint_file import CheckpointError

WRAPPERS = ("model", "module", "state_dict")
PREFIXES = ("module.", "_orig_mod.", "vision_encoder.", "backbone.", "encoder.", "student.")
OTHER_NETWORKS = ("clip_teacher.", "teacher.", "text_encoder.", "vision_proj.", "text_proj.", "itm_head.")
TEMPERATURE = "temp"  # of the contrastive loss


class Weights(NamedTuple):
    """A checkpoint's tensors by their plain names, what was taken off, and what is no weight of this network (and why)."""

    tensors: dict[str, Tensor]
    layout: str
    dropped: dict[str, str]


def unwrap(checkpoint: Mapping[str, Any]) -> Weights:
    """The weights of the video network in a checkpoint of any layout.

    Raises CheckpointError if there are none, or if two names become the same without their prefixes.
    """
    dropped: dict[str, str] = {}
    steps, content, path = [], checkpoint, ""
    while (wrapper := _wrapper(content)) is not None:
        dropped |= {path + str(name): f"beside {wrapper!r}, no weights" for name in content if name != wrapper}
        steps.append(f"under {wrapper!r}")
        content, path = content[wrapper], f"{path}{wrapper}."
    tensors: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    taken: set[str] = set()
    for full, value in content.items():
        name, prefixes = _strip(str(full))
        if not isinstance(value, Tensor):
            dropped[path + name] = f"a {type(value).__name__}, no tensor"
        elif name.startswith(OTHER_NETWORKS) or name == TEMPERATURE:
            dropped[name] = "of another network"
        elif name in tensors:
            raise CheckpointError(
                f"{origin[name]!r} and {full!r} are both {name!r} without their prefixes; pass a state_dict with one of them"
            )
        else:
            tensors[name], origin[name] = value, str(full)
            taken.update(prefixes)
    if not tensors:
        found = ", ".join(map(repr, list(content)[:8])) or "nothing"
        raise CheckpointError(
            f"no tensors in this checkpoint: it holds {found}. Weights are expected there, or under one of "
            + ", ".join(map(repr, WRAPPERS))
        )
    steps += [f"without {prefix!r}" for prefix in PREFIXES if prefix in taken]
    return Weights(tensors, ", ".join(steps) or "bare", dropped)


def _wrapper(content: Mapping[str, Any]) -> str | None:
    return next((name for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)


def _strip(name: str) -> tuple[str, list[str]]:
    """The name without its prefixes, in whatever sequence they stand, and these."""
    found = []
    while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
        found.append(prefix)
        name = name.removeprefix(prefix)
    return name, found
