"""The layouts in which VideoMamba's weights are published: containers around them and prefixes of their names.

- bare, or under "model", "module" or "state_dict", next to a trainer's entries (optimizer, epoch, args ...)
- with prefixed names: "module." (DDP), "_orig_mod." (torch.compile), "vision_encoder.", "backbone.", "encoder.", "student."
- next to other networks: the teacher of masked pretraining, the text encoder and projections of video-text models
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
    """A checkpoint's tensors by their plain names, its layout in words, and the entries that were dropped, with the reason."""

    tensors: dict[str, Tensor]
    layout: str
    dropped: dict[str, str]


def unwrap(checkpoint: Mapping[str, Any]) -> Weights:
    """Return the weights of the video network in a checkpoint of any layout.

    Raises CheckpointError if there are none, or if two names become the same without their prefixes.
    """
    dropped: dict[str, str] = {}
    layout, content, path = [], checkpoint, ""
    while (wrapper := _wrapper(content)) is not None:
        dropped |= {path + str(name): f"beside {wrapper!r}, no weights" for name in content if name != wrapper}
        layout.append(f"under {wrapper!r}")
        content, path = content[wrapper], f"{path}{wrapper}."
    tensors: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    stripped: set[str] = set()
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
            stripped.update(prefixes)
    if not tensors:
        found = ", ".join(map(repr, list(content)[:8])) or "nothing"
        raise CheckpointError(
            f"no tensors in this checkpoint: it holds {found}. Weights are expected there, or under one of "
            + ", ".join(map(repr, WRAPPERS))
        )
    layout += [f"without {prefix!r}" for prefix in PREFIXES if prefix in stripped]
    return Weights(tensors, ", ".join(layout) or "bare", dropped)


def _wrapper(content: Mapping[str, Any]) -> str | None:
    """Return the name under which the weights are wrapped, None if they are not."""
    return next((name for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)


def _strip(name: str) -> tuple[str, list[str]]:
    """Return the name without its prefixes, in any order, and these prefixes."""
    found = []
    while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
        found.append(prefix)
        name = name.removeprefix(prefix)
    return name, found
