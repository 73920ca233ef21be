"""How a thing looks in every figure of every page: one colour, one marker and one name each."""

from typing import NamedTuple

from harness.records.speed import Entry


class Look(NamedTuple):
    """A thing's name in words, its colour and its marker."""

    label: str
    colour: str
    marker: str


# By implementation, in the order in which they are preferred where a panel has no room for all. Colours of Okabe and Ito.
LOOKS = {
    "fused:native": Look("ours", "#0072B2", "o"),
    "fused:mamba_ssm": Look("upstream", "#D55E00", "^"),
    "cudnn": Look("ViT, cuDNN attention", "#009E73", "D"),
    "fused:native_kept": Look("ours, states kept", "#56B4E9", "s"),
    "fused:mamba_ssm_inner": Look("upstream, one fused mixer", "#E69F00", "v"),
    "flash": Look("ViT, flash attention", "#CC79A7", "P"),
    "efficient": Look("ViT, memory-efficient attention", "#7F7F3F", "p"),
    "sdpa": Look("ViT, PyTorch's attention", "#3B8C6E", "h"),
    "naive": Look("ViT, attention written out", "#8C8C8C", "X"),
    "decode_frames": Look("ours, frames of full size", "#0072B2", "o"),
    "read_clip": Look("ours, resized", "#56B4E9", "s"),
    "pyav": Look("a loop over PyAV", "#D55E00", "^"),
    "decord": Look("decord", "#009E73", "D"),
    "torchcodec": Look("torchcodec", "#CC79A7", "P"),
    "whole-bert": Look("all layers of BERT for every pair", "#A0522D", "<"),
    "pooling": Look("pooling", "#8C8C8C", "X"),
    "perceiver": Look("perceiver resampler", "#7F7F3F", "p"),
    "attention-sdpa": Look("self-attention, PyTorch's", "#009E73", "D"),
    "attention-naive": Look("self-attention written out", "#CC79A7", "P"),
    "timm": Look("ViT of timm", "#C44E8A", ">"),
    "fused:cpu": Look("ours, CPU kernels", "#4C8C2B", "8"),
    "fused:torch": Look("ours in plain PyTorch", "#7B52AB", "*"),
    "reference": Look("the reference", "#5B4636", "d"),
}
# By subject and implementation, where an implementation's name means another thing.
OWN = {
    ("vit", "reference"): LOOKS["naive"],
    ("vamba", "upstream"): Look("upstream's layers", "#A6761D", "<"),
    ("qwen2", "sdpa"): Look("Qwen2 with the video as tokens", "#009E73", "D"),
}
SPARE = (("#A6761D", "<"), ("#C44E8A", ">"), ("#6B8E23", "p"), ("#B03A2E", "H"), ("#2E86AB", "1"))


def look(implementation: str, subject: str = "") -> Look:
    """Return the look of an implementation; one without a look of its own gets one by its name."""
    if found := OWN.get((subject, implementation)) or LOOKS.get(implementation):
        return found
    return Look(implementation, *SPARE[sum(map(ord, implementation)) % len(SPARE)])


def of(entry: Entry) -> Look:
    """Return the look of an entry of a benchmark."""
    return look(entry.implementation, entry.subject)


def rank(implementation: str, subject: str = "") -> int:
    """Return the place of an implementation in the order of preference."""
    names = list(LOOKS)
    name = "naive" if implementation == "reference" and subject == "vit" else implementation
    return names.index(name) if name in names else len(names)
