"""The settings of an evaluation: every key, its default, and its allowed values. Keys of a training mean the same here."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from fused.evaluate.protocols import choose_views
from fused.io.picture import Size
from fused.io.views import Views, Windows
from fused.rules import COUNT, COUNT_OR_0, POSITIVE, POSITIVE_OR_0, Rule
from fused.train.config import RULES as TRAINING_RULES
from fused.train.config_file import parse_yaml
from fused.train.unknown_key import unknown_key

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """The settings of an evaluation.

    Raises ValueError at construction; the message names the key, its value and the allowed values.
    """

    protocol: str | None = None  # a name in PROTOCOLS
    views: int | None = None  # clips in time; None: the protocol's, else 1
    crops: int | None = None
    resize: str | None = None
    window: int | float | None = None  # seconds of a window of long videos; None: the whole video is one
    window_every: int | float | None = None  # seconds from one window to the next; None: `window`
    window_least: int | float | None = None  # seconds that the last window must have; None: half of `window`
    frames: int | None = None  # frames to short: None for the model's own
    size: Size | None = None
    sampling: str | None = None
    stride: int | None = None
    fps: int | float | None = None
    short: str | None = None
    separator: str | None = None  # separator to frame_pattern: of a list, as data.separator and so on of a training
    prefix: str | None = None
    columns: tuple[str, ...] | None = None
    frame_pattern: str | None = None
    labels: str | None = None  # a text file with a class name in each line; None: the names of the model's folder
    target_mean: int | float = 0  # of regression targets, subtracted
    target_std: int | float = 1  # by which the difference is divided
    batch_size: int = 8  # views in one forward of a process
    workers: int = 2  # decoding processes for each process
    precision: str = "float32"
    backend: str = "auto"
    device: str = "auto"

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
