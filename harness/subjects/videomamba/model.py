"""The models of a case: configuration, implementations, clips. VideoMamba's and its encoder's."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fused
import reference
from fused.io.video import read_clip
from fused.modules import mamba
from harness.fixtures.video import SHIPPED
from harness.judge.case import Case
from harness.judge.implementation import Implementation, fused_implementations
from harness.learning import motion, trained_weights

NAMED: dict[str, dict[str, Any]] = {
    "layernorm": {"rms_norm": False}, "unfused": {"fused_add_norm": False}, "tubelet2": {"kernel_size": 2},
    "causal": {"bimamba": False}, "image": {"num_frames": None},
}  # fmt: skip
DROP = "drop"  # the option of a case that drops clips at random


def implementations_of(model: str) -> list[Implementation]:
    """Return the model of this name in the reference and in `fused`, by backend, built from fields of its configuration."""

    def call_with(backend: str) -> Callable[..., Any]:
        return lambda config: getattr(fused, model)(fused.VideoMambaConfig(**config), backend=backend)

    first = Implementation("reference", lambda config: getattr(reference, model)(reference.VideoMambaConfig(**config)))
    return [first, *fused_implementations(mamba.BACKENDS, call_with, every_backend=True)]


def config(case: Case) -> dict[str, Any]:
    """Return fields of the model's configuration. Nothing is dropped at random, so that gradients can be compared, unless the
    case says so."""
    if case.has("trained"):
        return trained_weights.read().config
    fields: dict[str, Any] = {
        "img_size": case["S"], "depth": 2, "embed_dim": case["D"], "num_frames": case["T"], "num_classes": 10,
        "drop_path_rate": 0.5 if case.has(DROP) else 0.0, "scan_order": case.option("order", "spatial"),
        "readout": case.option("readout", "tokens" if case.has("causal") else "cls"),
    }  # fmt: skip
    for word in case.options:
        fields |= NAMED.get(word, {})
    return fields | ({"num_frames": case["T"] // 2} if case.has("stretch") else {})


def random_option() -> str:
    """Return the option of a case that drops clips at random in training."""
    return DROP


def build(call: Callable[..., Any], case: Case) -> nn.Module:
    """Return the model of a case."""
    return call(config(case))


def clip(case: Case, seed: int) -> Tensor:
    """Return the clips (B, C, T, S, S), float64: normal numbers, or frames from another part of the video for each seed and
    clip, or moving digits."""
    B, T, S = case["B"], case["T"], case["S"]
    if case.has("trained"):
        return motion.clips(trained_weights.read().pixels, case.generator(seed, "clip"), B)[0].double()
    if case.has("image"):
        return case.normal(seed, "clip", B, 3, S, S)
    if not case.has("video"):
        return case.normal(seed, "clip", B, 3, T, S, S)
    starts = [(seed * B + b) / (8 * B) for b in range(B)]
    path = case.video or SHIPPED
    return torch.stack([read_clip(path, T, S, start=s, stop=s + 0.5) for s in starts]).double()


def steps(case: Case) -> float:
    """Return the steps of two layers of two scans, twice as many in both orders."""
    return case["L"] * (1 + case["B"] * case["D"] * 32 / 20000) * (8 if case.option("order", "") == "both" else 4)


def tubelet(case: Case) -> int:
    """Return the frames of a tubelet."""
    return config(case).get("kernel_size", 1)
