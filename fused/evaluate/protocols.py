"""The protocols by which VideoMamba's authors tested, by name (image_sm and video_sm of OpenGVLab/VideoMamba)."""

import argparse
from collections.abc import Mapping
from types import MappingProxyType

from fused.io.views import RESIZES, Views, Windows
from fused.rules import COUNT, invalid, one_of

LVU_CLASSES = ("relation", "speak", "scene", "director", "genre", "writer", "year")
TARGET_PROTOCOLS = ("lvu-like", "lvu-view")  # of models with one output, tested by the mean squared error

PROTOCOLS: Mapping[str, Views] = MappingProxyType(
    {
        "k400": Views(4, 3, "sparse", "upstream"),
        "ssv2": Views(2, 3, "raw", "upstream"),
        "ssv2-validation": Views(1, 1, "raw-middle", "upstream"),
        "breakfast": Views(4, 3, "sparse", "upstream"),
        "coin": Views(10, 3, "sparse", "upstream"),
    }
    | {f"lvu-{name}": Views(4, 3, "sparse", "upstream") for name in LVU_CLASSES}
    | {name: Views(4, 3, "sparse", "upstream") for name in TARGET_PROTOCOLS}
    | {"in1k": Views(1, 1, "model", "imagenet")}  # of images
)
"""The views of each protocol: clips, crops, frames and resize are upstream's."""


def choose_views(
    protocol: str | None = None, clips: int | None = None, crops: int | None = None, resize: str | None = None,
    windows: Windows | None = None,
) -> Views:  # fmt: skip
    """Return the views of a protocol, with other numbers of clips or crops, or another resize, where given.

    Without a protocol there is one clip and one crop, with frames by the model's own rule and the resize of training. Raises
    ValueError for an unknown name and wrong values; the message names the argument as the command line does.
    """
    if protocol is not None:
        one_of(tuple(PROTOCOLS)).check("protocol", protocol)
    base = PROTOCOLS[protocol] if protocol is not None else Views()
    for name, value, rule in (("views", clips, COUNT), ("crops", crops, COUNT), ("resize", resize, one_of(RESIZES))):
        rule.optional().check(name, value)
    if base.frames == "raw-middle" and clips not in (None, 1):
        raise invalid("views", clips, f"1 with the protocol {protocol!r}")
    return Views(clips or base.clips, crops or base.crops, base.frames, resize or base.resize, windows)


def add_view_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `choose_views`."""
    parser.add_argument("--views", type=int, metavar="N", help="clips in time of each video (the protocol's, else 1)")
    parser.add_argument("--crops", type=int, metavar="N", help="crops of each clip, along the long side (as --views)")
    names = ", ".join(PROTOCOLS)
    parser.add_argument("--protocol", metavar="NAME", help=f"the views of VideoMamba's authors: {names}")
    parser.add_argument("--resize", choices=RESIZES, help="as in training (the default), or as the authors did it")
