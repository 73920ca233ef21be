"""VideoMambaEncoder: masked tokens, pooled feature, CLIP decoder."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from harness import modules
from harness.case import Case
from harness.subject import Implementation
from harness.subjects import videomamba


def cases(grid: str) -> list[Case]:
    """Masks, pooling types, both ways of the last feature, images; random clips and frames of the video."""

    def shape(B: int, T: int, S: int, D: int) -> dict[str, int]:
        return {"B": B, "T": T, "S": S, "D": D, "L": 1 + T * (S // 16) ** 2}

    tiny = [Case("encoder", tuple(shape(1, 2, 32, 4).items()), ("mask",), "float64")]
    variants: list[tuple[str, ...]] = [
        ("mask",), ("mask", "unfused"), ("mask", "order=alternating"), ("mask", "order=both"), ("pool=cls_cat_avg",),
        ("pool=avg", "temporal"), ("pool=cls", "layernorm"), ("one",),
    ]  # fmt: skip
    small = shape(2, 2, 32, 32)
    if grid == "smoke":
        return [
            *tiny,
            *modules.precisions([(small, v) for v in variants], "encoder", half=False),
            *modules.precisions([(shape(1, 4, 64, 192), ("mask", "video"))], "encoder", half=False),
        ]
    return [
        *tiny,
        *modules.precisions([(small, v) for v in variants], "encoder", half=True),
        *modules.precisions([(shape(2, 8, 64, 192), ("temporal",))], "encoder", half=True),
        *modules.precisions([(shape(2, 8, 224, 576), ("mask", "video"))], "encoder", half=True),
    ]


@functools.lru_cache(maxsize=1)
def implementations() -> list[Implementation]:
    """`VideoMambaEncoder` of the reference and of `fused`, by backend."""
    return videomamba.of_both("VideoMambaEncoder")


def build(call: Callable[..., Any], case: Case) -> nn.Module:
    """The encoder of a case, its decoder aligning two layers."""
    fields = videomamba.config(case) | {
        "pool_type": case.option("pool", "cls+avg"), "clip_return_layer": 2, "clip_output_dim": 24, "depth": 3
    }  # fmt: skip
    return call(fields)


def draw(case: Case, seed: int) -> dict[str, Tensor]:
    """A clip, of one tubelet for an image, and a trained model's parameters."""
    clip = videomamba.clip(case, seed)
    module = modules.on_meta(build, implementations()[0].call, case)
    return {"clip": clip[:, :, :1] if case.has("one") else clip} | modules.parameters(module, case, seed)


def mask(case: Case) -> Tensor | None:
    """Hides 3 in 4 patches, the same positions in every frame and others in every clip; CLS stays."""
    if not case.has("mask"):
        return None
    patches = (case["S"] // 16) ** 2
    scores = torch.rand(case["B"], patches, generator=case.generator(0, "mask"))
    hidden = scores.argsort(dim=1) >= max(1, patches // 4)
    return torch.cat((torch.zeros(case["B"], 1, dtype=torch.bool), hidden.repeat(1, case["T"])), dim=1)


def precise(case: Case) -> set[str]:
    """See `harness.modules.precise`."""
    return modules.precise(case, modules.on_meta(build, implementations()[0].call, case), {"clip"}, set())


def silent(case: Case) -> set[str]:
    """Every output has a cotangent."""
    return set()


def steps(case: Case) -> float:
    """Three layers of two scans over the visible tokens."""
    return 1.5 * videomamba.steps(case) / (4 if case.has("mask") else 1)


def evaluate(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tokens, pooled and aligned features."""
    hidden = mask(case)
    hidden = hidden.to(leaves["clip"].device) if hidden is not None else None
    model = modules.on_meta(build, call, case)
    with modules.precision(case, leaves):
        out = modules.call(model, leaves, lambda m, x: m(x, hidden, case.has("one"), case.has("temporal")), leaves["clip"])
    return dict(out._asdict())


def in_chunks(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor], frames: int) -> dict[str, Tensor]:
    """The same, by `forward_chunked`."""
    model = modules.on_meta(build, call, case)
    with modules.precision(case, leaves):
        run = videomamba.by_chunks(frames, keep_temporal=case.has("temporal"))
        out = modules.call(model, leaves, run, leaves["clip"])
    return dict(out._asdict())


chunk_frames = videomamba.chunk_frames
