"""The settings of an evaluation: every key, its default, and its allowed values. Keys of a training mean the same here."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from fused.evaluate.protocols import choose_views
from fused.io.picture import Size
from fused.io.views import Views, Windows
from fused.rules import COUNT, COUNT_OR_0, POSITIVE, POSITIVE_OR_0, Rule
from fused.train.config import RULES as TRAINING_RULES
from fused.train.config_file import parse_yaml
from fused.train.unknown_key import unknown_key

T = TypeVar("T")

VIEW_OPTIONS = ("protocol", "views", "crops", "resize")  # keys that are options of the command line too


def key(default: Any, meaning: str) -> Any:
    """Return a field of settings with its default, and what it means in words of the command line, where None is null."""
    return field(default=default, metadata={"meaning": meaning})


def describe_keys(kind: type) -> str:
    """Return a line for each key of settings, of the dataclass `kind`, that is no option: key=default and its meaning."""
    lines = []
    for f in fields(kind):
        default = json.dumps(f.default).strip('"')  # as YAML has it
        if f.name not in VIEW_OPTIONS:
            lines.append(f"  {f'{f.name}={default}':22} {f.metadata['meaning']}\n")
    return "".join(lines)


@dataclass(frozen=True)
class Settings:
    """The settings of an evaluation.

    Raises ValueError at construction; the message names the key, its value and the allowed values.
    """

    protocol: str | None = key(None, "the frames, crops and views that VideoMamba's authors tested with, as --protocol")
    views: int | None = key(None, "clips in time; null: the protocol's, else 1")
    crops: int | None = key(None, "crops of each clip; null: the protocol's, else 1")
    resize: str | None = key(None, "as --resize; null: the protocol's, else antialiased")
    window: int | float | None = key(None, "seconds of a window of long videos; null: the whole video is one")
    window_every: int | float | None = key(None, "seconds from one window to the next; null: window")
    window_least: int | float | None = key(None, "seconds that the last window must have; null: half of window")
    frames: int | None = key(None, "frames of a clip; null: the model's own, as of the next five keys")
    size: Size | None = key(None, "pixels of a side, or [height, width]")
    sampling: str | None = key(None, "segments, dense (neighbours, `stride` apart) or borders (as upstream's retrieval)")
    stride: int | None = key(None, "frames from one to the next, for dense sampling")
    fps: int | float | None = key(None, "frames a second at which the video is shown before frames are chosen")
    short: str | None = key(None, "what becomes of a video of too few frames: drop, loop or last")
    separator: str | None = key(None, "of a list: tab, comma, semicolon or blank; null: found out")
    prefix: str | None = key(None, "the folder of a list's paths; null: that of the list")
    columns: tuple[str, ...] | None = key(None, "of a list, such as [path, label, skip]; null: found out")
    frame_pattern: str | None = key(None, "of the images in folders of frames, such as img_*.jpg; null: all")
    labels: str | None = key(None, "a text file with a class name in each line; null: the names of the model's folder")
    target_mean: int | float = key(0, "of regression targets, subtracted")
    target_std: int | float = key(1, "by which the difference is divided")
    batch_size: int = key(8, "views in one forward of a process")
    workers: int = key(2, "decoding processes for each process")
    precision: str = key("float32", "float32, bfloat16 or float16")
    backend: str = key("auto", "see fused.backends")
    device: str = key("auto", "auto, cpu or cuda")

    def __post_init__(self) -> None:
        for f in fields(self):
            if f.name in _RULES:
                _RULES[f.name].check(f.name, getattr(self, f.name))
        for name in ("window_every", "window_least"):
            if getattr(self, name) is not None and self.window is None:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: nothing without window")
        self.chosen_views()

    def chosen_views(self) -> Views:
        """Return the views of a video. Raise ValueError for a wrong protocol, number or window."""
        windows = None
        if self.window is not None:
            every, least = self.window_every, self.window_least
            windows = Windows(self.window, every or self.window, self.window / 2 if least is None else least)
        return choose_views(self.protocol, self.views, self.crops, self.resize, windows)

    def preprocessing(self) -> dict[str, Any]:
        """Return the fields of `Preprocessing` that are set."""
        names = ("frames", "size", "sampling", "stride", "fps", "short")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def model_fields(self) -> dict[str, Any]:
        """Return the fields of `VideoMambaConfig` that are set, with which weights are loaded."""
        fields_of_model = {"num_frames": self.frames, "img_size": self.size}
        return {name: value for name, value in fields_of_model.items() if value is not None}

    def listing(self) -> dict[str, Any]:
        """Return the options of a list of videos."""
        return {name: getattr(self, name) for name in ("separator", "prefix", "columns")}


def read_settings(overrides: Sequence[str], given: dict[str, Any], kind: type[T] = Settings) -> T:  # type: ignore[assignment]
    """Return the settings of `key=value` words, whose values are YAML, and of options that are `given` (None: not given).

    `kind` is their dataclass.

    Raises ValueError for an unknown key, one that is given twice, and a wrong value; ImportError without pyyaml.
    """
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    values = {name: value for name, value in given.items() if value is not None}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ValueError(f"{override!r} is no setting; allowed: key=value, such as batch_size=16")
        if key not in known:
            raise unknown_key(key, known, known)
        if key in values:
            raise ValueError(f"{key} is given twice, {values[key]!r} and {text!r}; allowed: once")
        value = parse_yaml(text, override)
        values[key] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


_RULES = (
    {name: TRAINING_RULES[f"data.{name}"].optional() for name in ("frames", "size", "sampling", "stride", "fps", "short")}
    | {name: TRAINING_RULES[f"data.{name}"] for name in ("separator", "prefix", "columns", "frame_pattern")}
    | {name: TRAINING_RULES[f"data.{name}"] for name in ("target_mean", "target_std")}
    | {name: TRAINING_RULES[name] for name in ("precision", "backend", "device")}
    | {
        "window": POSITIVE.optional(),
        "window_every": POSITIVE.optional(),
        "window_least": POSITIVE_OR_0.optional(),
        "labels": Rule(lambda value: isinstance(value, str) and bool(value), "a text file").optional(),
        "batch_size": COUNT,
        "workers": COUNT_OR_0,
    }
)
