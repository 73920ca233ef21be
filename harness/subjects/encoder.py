"""VideoMambaEncoder: masked tokens, pooled feature, CLIP decoder."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.fixtures import functional_modules as modules
from harness.instruments import short_training
from harness.judge.case import Case
from harness.judge.implementation import Implementation
from harness.subjects.videomamba import chunks
from harness.subjects.videomamba import model as models
from harness.subjects.videomamba.grids import shape
from reference.ops.dtypes import accumulation_dtype


def cases(grid: str) -> list[Case]:
    """Return masks, pooling types, both ways of the last feature, images; random clips and frames of the video."""
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
            *modules.in_precisions([*((small, v) for v in variants), *streams], "encoder", half=False),
            *modules.in_precisions([(shape(1, 4, 64, 192), ("mask", "video"))], "encoder", half=False),
        ]
    return [
        *tiny,
        *modules.in_precisions([*((small, v) for v in variants), *streams], "encoder", half=True),
        *modules.in_precisions([(shape(2, 8, 64, 192), ("temporal",))], "encoder", half=True),
        *modules.in_precisions([(shape(2, 8, 224, 576), ("mask", "video"))], "encoder", half=True),
    ]


@functools.lru_cache(maxsize=1)
def implementations() -> list[Implementation]:
    """Return `VideoMambaEncoder` of the reference and of `fused`, by backend."""
    return models.implementations_of("VideoMambaEncoder")


def build(call: Callable[..., Any], case: Case) -> nn.Module:
    """Return the encoder of a case, its decoder aligning two layers."""
    fields = models.config(case) | {
        "pool_type": case.option("pool", "cls+avg"), "clip_return_layer": 2, "clip_output_dim": 24, "depth": 3
    }  # fmt: skip
    return call(fields)


def draw(case: Case, seed: int) -> dict[str, Tensor]:
    """Draw a clip, of one tubelet for an image, and a trained model's parameters."""
    clip = short_training.clips(case) if case.only_check == "convergence" else models.clip(case, seed)
    module = modules.on_meta(build, implementations()[0].call, case)
    return {"clip": clip[:, :, :1] if case.has("one") else clip} | modules.parameters(module, case, seed)


def mask(case: Case) -> Tensor | None:
    """Return the tokens (B, L) that are hidden: 3 in 4 patches, the same in every frame and others in every clip; never CLS."""
    if not case.has("mask"):
        return None
    patches = (case["S"] // 16) ** 2
    scores = torch.rand(case["B"], patches, generator=case.generator(0, "mask"))
    hidden = scores.argsort(dim=1) >= max(1, patches // 4)
    return torch.cat((torch.zeros(case["B"], 1, dtype=torch.bool), hidden.repeat(1, case["T"])), dim=1)


def precise(case: Case) -> set[str]:
    """Return those of `functional_modules.precise`."""
    return modules.precise(case, modules.on_meta(build, implementations()[0].call, case), {"clip"}, set())


def no_cotangent(case: Case) -> set[str]:
    """Return nothing: every output has a cotangent."""
    return set()


def output_values(case: Case) -> int:
    """Return the values of the tokens."""
    return case["B"] * case["L"] * case["D"]


def steps(case: Case) -> float:
    """Return the steps of three layers of two scans over the visible tokens."""
    return 1.5 * models.steps(case) / (4 if case.has("mask") else 1)


def num_units(case: Case) -> int:
    """Return the tubelets."""
    return case["T"]


def time_axes(case: Case) -> dict[str, int]:
    """Return axis 2 for frames and for aligned tokens, axis 1 for tokens, and for tubelets if they are pooled."""
    return {"clip": 2, "tokens": 1} | ({"pooled": 1} if case.has("temporal") else {})


def evaluate(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tokens, pooled and aligned features, and of a causal encoder every layer's states."""
    if case.has("state"):
        return chunked(call, case, leaves, (0,))
    hidden = mask(case)
    hidden = hidden.to(leaves["clip"].device) if hidden is not None else None
    model = modules.on_meta(build, call, case)
    with modules.precision(case, leaves):
        out = modules.call(model, leaves, lambda m, x: m(x, hidden, case.has("one"), case.has("temporal")), leaves["clip"])
    return dict(out._asdict())


def chunked(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor], cuts: tuple[int, ...]) -> dict[str, Tensor]:
    """Return the outputs of a video sent through the encoder chunk by chunk, each with its part of the mask."""
    all_hidden, patches = mask(case), (case["S"] // 16) ** 2

    def hidden(start: int, stop: int) -> Tensor | None:
        return None if all_hidden is None else all_hidden[:, 1 + start * patches - (start == 0) : 1 + stop * patches]

    options = {"mask": hidden, "keep_temporal": lambda start, stop: case.has("temporal")}
    model = modules.on_meta(build, call, case)
    with modules.precision(case, leaves):
        run = lambda m, x: chunks.run_in_chunks(m, case, x, cuts, case["T"], options)  # noqa: E731
        parts, states = modules.call(model, leaves, run, leaves["clip"])
    return outputs(parts, case) | chunks.named_states(states)


def outputs(parts: list[Any], case: Case) -> dict[str, Tensor]:
    """Return the outputs of the chunks side by side; of what is pooled over all so far, the last."""
    pooled = torch.cat([p.pooled for p in parts], dim=1) if case.has("temporal") else parts[-1].pooled
    tokens, clip = torch.cat([p.tokens for p in parts], dim=1), torch.cat([p.clip for p in parts], dim=2)
    return {"tokens": tokens, "pooled": pooled, "clip": clip}


def forward_chunked(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor], frames: int) -> dict[str, Tensor]:
    """Return the outputs, by `forward_chunked`."""
    model = modules.on_meta(build, call, case)
    with modules.precision(case, leaves):
        run = chunks.run_forward_chunked(frames, keep_temporal=case.has("temporal"))
        out = modules.call(model, leaves, run, leaves["clip"])
    return dict(out._asdict())


chunk_frames = chunks.chunk_frames


def special_cases(check: str, grid: str) -> list[Case]:
    """Return the cases that only one check asks: `convergence` trains under a mask, in grid `smoke` under autocast only;
    `processes` pretrains, which is too slow for grid `smoke`."""
    if check == "convergence":
        options = "mask", "video", "steps=60", "for=convergence"
        found = modules.in_precisions([(shape(12, 2, 32, 16), options)], "encoder", half=False)
        return found[1:] if grid == "smoke" else found
    if check == "processes" and grid != "smoke":
        return [Case("encoder", tuple(shape(4, 2, 32, 32).items()), ("video", "for=processes"))]
    return []


def training_title() -> str:
    """Return the task in a few words, for plots."""
    return "masked alignment"


def learning_rate() -> float:
    """Return the rate of SGD with momentum."""
    return 0.05


def training_target(call: Callable[..., Any], case: Case, clip: Tensor) -> Tensor:
    """Return the features (B, K, V, C), float32, that another random encoder makes of whole clips, for tokens not hidden."""
    model, hidden = modules.on_meta(build, call, case), mask(case)
    with torch.no_grad():
        layers = modules.call(model, modules.parameters(model, case, 1), lambda m, x: m(x).clip, clip)
    hidden = torch.zeros(layers.shape[1:3], dtype=torch.bool) if hidden is None else hidden
    return torch.stack([layers[:, b, ~hidden[b]] for b in range(len(clip))]).float()


def training_losses(model: nn.Module, case: Case, clip: Tensor, rows: list[int], target: Tensor) -> Tensor:
    """Return how far every clip's features, computed under the mask, are from the target: the masked alignment loss."""
    hidden = mask(case)
    with modules.precision(case, {"clip": clip}):
        found = model(clip, None if hidden is None else hidden[rows].to(clip.device)).clip.transpose(0, 1)
    found = found.to(accumulation_dtype(found.dtype))
    return (2 - 2 * F.cosine_similarity(found, target.to(found.dtype), dim=-1)).flatten(1).mean(1)


def training_words(drawn: bool) -> tuple[str, ...]:
    """Return the words of a pretraining; a random mask only if `drawn`."""
    return "task=pretrain", "mask.ratio=0.5" if drawn else "mask.ratio=0"


def first_steps() -> int:
    """Return two: of an encoder without a gradient, DDP would learn in its second step."""
    return 2


def needs_teacher() -> bool:
    """Return True."""
    return True
