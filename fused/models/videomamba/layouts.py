"""The layouts in which weights of VideoMamba come: containers around them, and prefixes of their names.

- bare, or in a container of `WRAPPERS` next to a trainer's entries (optimizer, epoch, args ...)
- averaged weights (EMA) in a container of `EMA_WRAPPERS`, under names that begin with one of `EMA_PREFIXES`, or beside the
  count `n_averaged` of PyTorch's AveragedModel
- with the names that FSDP, torch.compile and checkpointed activations put anywhere into a name
- with prefixes: those of `PREFIXES` in any order, or another one that begins every name of the network ("model." of Lightning)
- next to other networks: the teacher of masked pretraining, the text encoder and projections of video-text models
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from fused.io.checkpoint_file import CheckpointError
from fused.rules import invalid

WHICH = ("model", "ema")
WRAPPERS = ("model", "module", "state_dict", "model_state_dict", "model_state")
EMA_WRAPPERS = ("model_ema", "state_dict_ema", "ema")  # upstream's and torchvision's; timm's; that of many small trainers
EMA_PREFIXES = ("ema_model.", "model_ema.", "ema.")
PREFIXES = ("module.", "vision_encoder.", "backbone.", "encoder.", "student.")
OTHER_NETWORKS = ("clip_teacher.", "teacher.", "text_encoder.", "vision_proj.", "text_proj.", "itm_head.")
TEMPERATURE = "temp"  # of the contrastive loss
AVERAGED = "n_averaged"
PARTS = (
    "cls_token", "pos_embed", "temporal_pos_embedding", "patch_embed.", "layers.", "norm.", "norm_f.", "head.", "clip_decoder.",
    "pool_norm.", "distill_head.",
)  # fmt: skip

_WRAPPED = re.compile(r"(?<![^.])(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_LAYER = re.compile(r"(?<![^.])layers\.\d+\.mixer\.")  # in the names of every VideoMamba, and of few other networks


class Weights(NamedTuple):
    """A checkpoint's tensors by their plain names, its layout in words, and the entries that were dropped, with the reason."""

    tensors: dict[str, Tensor]
    layout: str
    dropped: dict[str, str]


def unwrap(checkpoint: Mapping[str, Any], which: str = "model") -> Weights:
    """Return the weights of the video network in a checkpoint of any layout: the "model"'s, or their average, "ema".

    Raises ValueError for another `which`; CheckpointError if there are no such weights, if several networks could be meant, or
    if two names become the same without their prefixes.
    """
    if which not in WHICH:
        raise invalid("which", which, "one of " + ", ".join(map(repr, WHICH)))
    content, path, dropped = _open(checkpoint, which)
    names = _Names(content)
    dropped |= names.select(which, not set(path).isdisjoint(EMA_WRAPPERS), _some(checkpoint))
    dropped |= names.strip_network()
    tensors: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for full, name in names.plain.items():
        value = content[full]
        if not isinstance(value, Tensor):
            dropped[".".join([*path, name])] = f"a {type(value).__name__}, no tensor"
        elif name.startswith(OTHER_NETWORKS) or name == TEMPERATURE:
            dropped[name] = "of another network"
        elif name == AVERAGED:
            dropped[name] = "the number of averaged models"
        elif name in tensors:
            raise CheckpointError(
                f"{origin[name]!r} and {full!r} are both {name!r} without their prefixes; pass a state_dict with one of them"
            )
        else:
            tensors[name], origin[name] = value, str(full)
    if not tensors:
        raise CheckpointError(f"no tensors in this checkpoint: {_describe(content)}")
    layout = [f"under {wrapper!r}" for wrapper in path] + [f"without {prefix!r}" for prefix in names.stripped]
    return Weights(tensors, ", ".join(layout) or "bare", dropped)


def plain_name(name: str) -> str:
    """Return a name without what wrappers put into it."""
    return _WRAPPED.sub("", name)


def _open(checkpoint: Mapping[str, Any], which: str) -> tuple[Mapping[str, Any], list[str], dict[str, str]]:
    """Return the innermost content of a checkpoint's containers, their names, and what lies beside them, with the reason."""
    content, path = checkpoint, list[str]()
    dropped: dict[str, str] = {}
    while True:
        wanted = (*EMA_WRAPPERS, *WRAPPERS) if which == "ema" else WRAPPERS
        wrapper = next((name for name in wanted if isinstance(content.get(name), Mapping)), None)
        if wrapper is None:
            return content, path, dropped
        for name in content:
            average = which == "model" and name in EMA_WRAPPERS and isinstance(content[name], Mapping)
            reason = "averaged weights, which='ema' loads them" if average else f"beside {wrapper!r}, not read"
            if name != wrapper:
                dropped[".".join([*path, str(name)])] = reason
        content, path = content[wrapper], [*path, wrapper]


class _Names:
    """The names in a container, by the keys there, while prefixes are taken off them."""

    def __init__(self, content: Mapping[Any, Any]) -> None:
        self.stripped: dict[str, None] = {}  # an ordered set
        self.plain: dict[Any, str] = {}
        for full in content:
            name = str(full)
            self.stripped |= dict.fromkeys(_WRAPPED.findall(name))
            self.plain[full] = self._strip(plain_name(name), PREFIXES)

    def _strip(self, name: str, prefixes: tuple[str, ...]) -> str:
        """Return the name without these prefixes, in any order, and note which there were."""
        while prefix := next((p for p in prefixes if name.startswith(p)), None):
            self.stripped[prefix] = None
            name = name.removeprefix(prefix)
        return name

    def select(self, which: str, averaged: bool, holds: str) -> dict[str, str]:
        """Keep the names of the weights that are asked for; return those of the others, with the reason.

        `averaged` says that the container is one of averaged weights, `holds` what the checkpoint holds. Raises
        CheckpointError if nothing would be left.
        """
        ema = {full for full, name in self.plain.items() if name.startswith(EMA_PREFIXES)}
        if which == "ema" and not (ema or averaged or AVERAGED in self.plain.values()):
            raise CheckpointError(
                f"which is 'ema', but there are no averaged weights in this checkpoint: it holds {holds}. They are expected "
                f"under one of {_quoted(EMA_WRAPPERS)}, or with names that begin with one of {_quoted(EMA_PREFIXES)}; "
                "which='model' loads the others"
            )
        if not ema:
            return {}
        if which == "model" and not any(_LAYER.search(self.plain[full]) for full in self.plain.keys() - ema):
            raise CheckpointError("there are only averaged weights in this checkpoint; which='ema' loads them")
        left_out, reason = ema, "averaged weights, which='ema' loads them"
        if which == "ema":
            left_out, reason = self.plain.keys() - ema, "no averaged weights"
            self.plain |= {full: self._strip(self.plain[full], EMA_PREFIXES + PREFIXES) for full in ema}
        dropped = {str(full): reason for full in self.plain if full in left_out}
        self.plain = {full: name for full, name in self.plain.items() if full not in left_out}
        return dropped

    def strip_network(self) -> dict[str, str]:
        """Take off the prefix that begins every name of the network; return the names without it, with the reason.

        Names of parts of a VideoMamba beside the prefix stay, as a head beside "model.". Raises CheckpointError for several
        networks with prefixes.
        """
        found: dict[str, None] = {}
        for name in self.plain.values():
            if layer := _LAYER.search(name):
                found[self._outer(name[: layer.start()])] = None
        prefixes = [prefix for prefix in found if not any(f".{other}" in f".{prefix}" for other in OTHER_NETWORKS)]
        if not prefixes or "" in prefixes:
            return {}
        if len(prefixes) > 1:
            raise CheckpointError(
                f"there are several networks in this checkpoint, with names that begin with {_quoted(prefixes)}; pass the "
                "state_dict of one of them"
            )
        dropped, prefix = {}, prefixes[0]
        self.stripped[prefix] = None
        for full, name in list(self.plain.items()):
            if name.startswith(prefix):
                self.plain[full] = self._strip(name.removeprefix(prefix), PREFIXES)
            elif not name.startswith(PARTS):
                dropped[str(full)] = f"its name does not begin with {prefix!r}"
                del self.plain[full]
        return dropped

    @staticmethod
    def _outer(prefix: str) -> str:
        """Return a prefix without those of `PREFIXES` at its end."""
        while known := next((p for p in PREFIXES if f".{prefix}".endswith(f".{p}")), None):
            prefix = prefix.removesuffix(known)
        return prefix


def _describe(content: Mapping[Any, Any]) -> str:
    """Return in words what a container without tensors holds, and where weights are expected."""
    text = f"it holds {_some(content)}. Weights are expected there, or under one of {_quoted(WRAPPERS)}"
    for name, inner in content.items():
        if isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values()):
            if name in EMA_WRAPPERS:
                return f"{text}; {name!r} holds averaged weights, which='ema' loads them"
            return f"{text}; {name!r} holds tensors: if these are the weights, pass checkpoint[{name!r}]"
    return text


def _some(content: Mapping[Any, Any]) -> str:
    """Return the first names in a container."""
    return ", ".join(map(repr, list(content)[:8])) or "nothing"


def _quoted(names: Any) -> str:
    """Return names in quotes."""
    return ", ".join(map(repr, names))
