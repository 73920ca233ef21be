"""The names of a classifier's classes: in the order of its logits, in config.json, and for the most likely classes."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fused.models.videomamba.config import VideoMambaConfig
from fused.rules import abbreviate, check_integer


class Labelled:
    """A classifier with `config` whose classes may have names."""

    config: VideoMambaConfig
    _labels: tuple[str, ...] | None = None

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The names of the classes in the order of the logits; None if they are unknown.

        Set it to as many names as the model has classes, or to None. Raises TypeError for anything but a sequence of names,
        ValueError for another number of names and for names that are equal or empty.
        """
        return self._labels

    @labels.setter
    def labels(self, names: Sequence[str] | None) -> None:
        self._labels = None if names is None else check_labels(names, self.config.num_classes)

    def top_labels(self, logits: Tensor, top: int = 5) -> list[list[tuple[str, float]]]:
        """Return the names and probabilities of the `top` most likely classes of each clip, the most likely first.

        `logits` is (B, num_classes); a model with fewer than `top` classes gives all of them. The softmax is computed in
        float32. Raises ValueError without `labels`, for logits of another shape and for `top` below 1, TypeError for another
        type.

            >>> model.top_labels(model(clip), top=1)
            [[('archery', 0.93)]]
        """
        check_integer("top_labels", "top", top, 1)
        if self.labels is None:
            raise ValueError("labels is None: the model's folder has no class names; set model.labels to a sequence of them")
        if not isinstance(logits, Tensor):
            raise TypeError(f"top_labels: logits must be a tensor (B, num_classes), got {type(logits).__name__}")
        if logits.dim() != 2 or logits.shape[1] != len(self.labels):
            shape = f"(B, num_classes), here (B, {len(self.labels)})"
            raise ValueError(f"top_labels: logits must be {shape}, got {tuple(logits.shape)}")
        best = logits.detach().float().softmax(dim=1).topk(min(top, len(self.labels)), dim=1)
        names = self.labels
        return [
            [(names[index], probability) for index, probability in zip(indices, probabilities, strict=True)]
            for indices, probabilities in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


def check_labels(names: Sequence[str], num_classes: int) -> tuple[str, ...]:
    """Return the names as a tuple. Raise TypeError or ValueError unless they are `num_classes` different, non-empty ones."""
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"labels must be a sequence of names, or None, got {names!r}")
    if len(names) != num_classes:
        length = f"labels has the length {len(names)} ({abbreviate(names)})"
        raise ValueError(f"{length}; allowed: num_classes ({num_classes}), a name for each class")
    seen: set[str] = set()
    for name in names:
        if not name or name in seen:
            raise ValueError(f"labels has {name!r}{' twice' if name else ''}; allowed: names that differ and are not empty")
        seen.add(name)
    return tuple(names)


def labels_to_json(names: Sequence[str]) -> dict[str, Any]:
    """Return the two entries of config.json that hold class names, as the Hugging Face hub and transformers have them."""
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def labels_from_json(id2label: Mapping[str, str], num_classes: int) -> tuple[str, ...]:
    """Return the names of `id2label`, whose keys are class numbers as text. Raise TypeError or ValueError if they misfit."""
    if not isinstance(id2label, Mapping):
        raise TypeError(f"id2label must map class numbers to names, got {id2label!r}")
    missing = [i for i in range(len(id2label)) if str(i) not in id2label]
    if missing:
        keys = abbreviate(list(id2label))
        raise ValueError(f"id2label has the keys {keys}, and not {missing[0]}; allowed: every number from 0 up")
    return check_labels([id2label[str(i)] for i in range(len(id2label))], num_classes)
