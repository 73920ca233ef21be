"""VideoMambaEncoder: masked tokens, pooled feature, CLIP decoder."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from harness.fixtures import functional_modules as modules
from harness.judge.case import Case
from harness.judge.registry import Implementation
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
    small, longer = shape(2, 2, 32, 32), shape(2, 3, 32, 32)
    streams = [(longer, ("causal", "state", *v)) for v in (("pool=avg", "mask"), ("pool=last", "temporal"))]
    if grid == "smoke":
        return [
            *tiny,
            *modules.precisions([*((small, v) for v in variants), *streams], "encoder", half=False),
            *modules.precisions([(shape(1, 4, 64, 192), ("mask", "video"))], "encoder", half=False),
        ]
    return [
        *tiny,
        *modules.precisions([*((small, v) for v in variants), *streams], "encoder", half=True),
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
    """See `harness.fixtures.functional_modules.precise`."""
    return modules.precise(case, modules.on_meta(build, implementations()[0].call, case), {"clip"}, set())


def silent(case: Case) -> set[str]:
    """Every output has a cotangent."""
    return set()


def steps(case: Case) -> float:
    """Three layers of two scans over the visible tokens."""
    return 1.5 * videomamba.steps(case) / (4 if case.has("mask") else 1)


def pieces(case: Case) -> int:
    """Tubelets."""
    return case["T"]


def time_axes(case: Case) -> dict[str, int]:
    """Frames of the clip and tokens of what is aligned, both on axis 2; tokens, and tubelets if they are pooled."""
    return {"clip": 2, "tokens": 1} | ({"pooled": 1} if case.has("temporal") else {})


def evaluate(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tokens, pooled and aligned features, and of a causal encoder every layer's states."""
    if case.has("state"):
        return chunked(call, case, leaves, (0,))
    hidden = mask(case)
    hidden = hidden.to(leaves["clip"].device) if hidden is not None else None
    model = modules.on_meta(build, call, case)
    with modules.precision(case, leaves):
        out = modules.call(model, leaves, lambda m, x: m(x, hidden, case.has("one"), case.has("temporal")), leaves["clip"])
    return dict(out._asdict())


def chunked(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor], cuts: tuple[int, ...]) -> dict[str, Tensor]:
    """A video sent through the encoder chunk by chunk, each with its part of the mask."""
    whole, patches = mask(case), (case["S"] // 16) ** 2

    def hidden(start: int, stop: int) -> Tensor | None:
        return None if whole is None else whole[:, 1 + start * patches - (start == 0) : 1 + stop * patches]

    how = {"mask": hidden, "keep_temporal": lambda start, stop: case.has("temporal")}
    model = modules.on_meta(build, call, case)
    with modules.precision(case, leaves):
        parts, states = modules.call(model, leaves, lambda m, x: videomamba.stream(m, case, x, cuts, how), leaves["clip"])
    return outputs(parts, case) | videomamba.named(states)


def outputs(parts: list[Any], case: Case) -> dict[str, Tensor]:
    """What the chunks gave, side by side; of what is pooled over all so far, the last."""
    pooled = torch.cat([p.pooled for p in parts], dim=1) if case.has("temporal") else parts[-1].pooled
    tokens, clip = torch.cat([p.tokens for p in parts], dim=1), torch.cat([p.clip for p in parts], dim=2)
    return {"tokens": tokens, "pooled": pooled, "clip": clip}


def in_chunks(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor], frames: int) -> dict[str, Tensor]:
    """The same, by `forward_chunked`."""
    model = modules.on_meta(build, call, case)
    with modules.precision(case, leaves):
        run = videomamba.by_chunks(frames, keep_temporal=case.has("temporal"))
        out = modules.call(model, leaves, run, leaves["clip"])
    return dict(out._asdict())


chunk_frames = videomamba.chunk_frames
