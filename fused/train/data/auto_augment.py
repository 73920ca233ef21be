"""Random changes of colour and shape, the same for all frames of a clip: RandAugment, and AutoAugment's policy "v0".

Sources: arXiv 1909.13719 and arXiv 1805.09501, in the form that timm gave them and by which upstream trains. A policy is text
in timm's notation, `rand-m7-n4-mstd0.5-inc1`:

    rand  two operations, or n of them, are drawn from RAND, each is applied with probability 1/2
    m     their level, from 0 to 10 (10)
    n     their number (2)
    mstd  standard deviation of the level, which is drawn for each operation and limited to 0..10 (0: none)
    inc   a higher level changes more in the operations of INCREASING too, for which it else does not

or `v0`: one of the pairs of V0 is drawn, each with its own probabilities and levels.
"""

import random
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor

Colour = tuple[int, int, int]
GREY: Colour = (128, 128, 128)  # of what a shifted frame leaves free
MAX_LEVEL = 10.0
PROBABILITY = 0.5  # of RandAugment's operations

RAND = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast", "Brightness",
    "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY",
)  # fmt: skip
INCREASING = ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness")
V0 = """
Equalize 0.8 1, ShearY 0.8 4         ;  Color 0.4 9, Equalize 0.6 3          ;  Color 0.4 1, Rotate 0.6 8
Solarize 0.8 3, Equalize 0.4 7       ;  Solarize 0.4 2, Solarize 0.6 2       ;  Color 0.2 0, Equalize 0.8 8
Equalize 0.4 8, SolarizeAdd 0.8 3    ;  ShearX 0.2 9, Rotate 0.6 8           ;  Color 0.6 1, Equalize 1.0 2
Invert 0.4 9, Rotate 0.6 0           ;  Equalize 1.0 9, ShearY 0.6 3         ;  Color 0.4 7, Equalize 0.6 0
Posterize 0.4 6, AutoContrast 0.4 7  ;  Solarize 0.6 8, Color 0.6 9          ;  Solarize 0.2 4, Rotate 0.8 9
Rotate 1.0 7, TranslateY 0.8 9       ;  ShearX 0.0 0, Solarize 0.8 4         ;  ShearY 0.8 0, Color 0.6 4
Color 1.0 0, Rotate 0.6 2            ;  Equalize 0.8 4, Equalize 0.0 8       ;  Equalize 1.0 4, AutoContrast 0.6 2
ShearY 0.4 7, SolarizeAdd 0.6 7      ;  Posterize 0.8 2, Solarize 0.6 10     ;  Solarize 0.6 8, Equalize 0.6 1
Color 0.8 6, Rotate 0.4 5
"""  # pairs of operation, probability, level


class Layer(NamedTuple):
    """An operation that may be drawn: its probability, its level and the level's standard deviation."""

    name: str
    probability: float
    level: float
    std: float = 0.0


class Operation(NamedTuple):
    """An operation that was drawn, with its argument: an angle, a factor, a share of the frame, a number of bits, a value."""

    name: str
    argument: float


@dataclass(frozen=True)
class AugmentPolicy:
    """The choices that are drawn for a clip: one of `choices` after another, `draws` times, and of each its layers."""

    choices: tuple[tuple[Layer, ...], ...]
    draws: int
    increasing: bool

    @classmethod
    def parse(cls, text: str) -> "AugmentPolicy":
        """Return the policy of a text such as "rand-m7-n4-mstd0.5-inc1" or "v0". Raise ValueError for any other."""
        if text == "v0":
            pairs = [pair.split(",") for line in V0.strip().splitlines() for pair in line.split(";")]
            return cls(tuple(tuple(_layer(*words.split()) for words in pair) for pair in pairs), 1, False)
        kind, *parts = text.split("-")
        options = {"m": MAX_LEVEL, "n": 2.0, "mstd": 0.0, "inc": 0.0}
        given = [re.fullmatch(r"(mstd|inc|m|n)(\d+(?:\.\d+)?)", part) for part in parts]
        names = [match[1] for match in given if match]
        if kind != "rand" or len(names) < len(parts) or len(set(names)) < len(names):
            raise ValueError(f"{text!r} is no policy of augmentation; allowed: {ALLOWED}")
        options |= {match[1]: float(match[2]) for match in given if match}
        if options["m"] > MAX_LEVEL or options["n"] < 1 or options["n"] % 1 or options["inc"] not in (0, 1):
            raise ValueError(f"{text!r} is no policy of augmentation; allowed: {ALLOWED}")
        layers = tuple((Layer(name, PROBABILITY, options["m"], options["mstd"]),) for name in RAND)
        return cls(layers, int(options["n"]), bool(options["inc"]))

    def draw(self, rng: random.Random) -> list[Operation]:
        """Return the operations for a clip, in their order; all choices are drawn from `rng`."""
        drawn = []
        for layers in rng.choices(self.choices, k=self.draws):
            for name, probability, level, std in layers:
                if rng.random() >= probability:
                    continue
                level = min(max(rng.gauss(level, std) if std else level, 0.0), MAX_LEVEL)
                drawn.append(Operation(name, self._argument(name, level, rng)))
        return drawn

    def _argument(self, name: str, level: float, rng: random.Random) -> float:
        """Return the argument of an operation at a level from 0 to 10; its sign is drawn where it has one."""
        share, grows = level / MAX_LEVEL, self.increasing and name in INCREASING
        if name in ("Color", "Contrast", "Brightness", "Sharpness"):
            return 1 + _signed(0.9 * share, rng) if grows else 0.1 + 1.8 * share
        if name in SIGNED:
            return _signed(SIGNED[name] * share, rng)
        most = {"Posterize": 4, "Solarize": 256, "SolarizeAdd": 110}.get(name, 0)
        value = int(share * most)
        return float(most - value if grows else value)


ALLOWED = "v0, or rand with any of m (level, 0 to 10), n (operations), mstd, inc1, such as rand-m7-n4-mstd0.5-inc1"
# Operations with a sign, and their argument at the highest level: degrees, and shares of the frame.
SIGNED = {"Rotate": 30.0, "ShearX": 0.3, "ShearY": 0.3, "TranslateX": 0.45, "TranslateY": 0.45}


def apply_operations(image: UInt8[Tensor, "H W 3"], operations: list[Operation], fill: Colour = GREY) -> UInt8[Tensor, "H W 3"]:
    """Return the RGB image after the operations, by Pillow as upstream; what shifting leaves free has the colour `fill`.

    Raises ImportError, with what to do, without Pillow.
    """
    if not operations:
        return image
    picture = pillow().Image.fromarray(image.contiguous().numpy())
    for operation in operations:
        picture = _change(picture, *operation, fill)
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(image.shape)


def pillow() -> Any:
    """Return the package PIL with its modules. Raise ImportError that says how to install it."""
    try:
        import PIL
        from PIL import Image, ImageEnhance, ImageOps  # noqa: F401
    except ImportError as error:
        raise ImportError("pillow is not installed: pip install 'videomamba-bench[train]'") from error
    return PIL


def _layer(name: str, probability: str, level: str) -> Layer:
    return Layer(name, float(probability), float(level))


def _signed(value: float, rng: random.Random) -> float:
    """Return the value or its negative, each with probability 1/2."""
    return -value if rng.random() > 0.5 else value


def _change(picture: Any, name: str, argument: float, fill: Colour) -> Any:
    """Return the picture after an operation. The matrix (a, ..., f) takes (x, y) from (a x + b y + c, d x + e y + f)."""
    pil = pillow()
    ops, bicubic = pil.ImageOps, pil.Image.Resampling.BICUBIC
    matrices = {
        "ShearX": (1, argument, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, argument, 1, 0),
        "TranslateX": (1, 0, argument * picture.width, 0, 1, 0),
        "TranslateY": (1, 0, 0, 0, 1, argument * picture.height),
    }
    match name:
        case "AutoContrast" | "Equalize" | "Invert":
            return getattr(ops, name.lower())(picture)
        case "Solarize":
            return ops.solarize(picture, int(argument))
        case "SolarizeAdd":  # on values below 128
            return picture.point([min(255, value + int(argument)) if value < 128 else value for value in range(256)] * 3)
        case "Posterize":  # keeps the highest bits, of which there may be 0; newer ImageOps.posterize refuse that
            return picture.point([value & ~(255 >> int(argument)) for value in range(256)] * 3)
        case "Rotate":
            return picture.rotate(argument, resample=bicubic, fillcolor=fill)
        case "Color" | "Contrast" | "Brightness" | "Sharpness":
            return getattr(pil.ImageEnhance, name)(picture).enhance(argument)
        case _:
            affine = pil.Image.Transform.AFFINE
            return picture.transform(picture.size, affine, matrices[name], resample=bicubic, fillcolor=fill)
