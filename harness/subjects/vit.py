"""ViT with joint space-time attention, the baseline: its attention kernels, and timm's model, against naive attention."""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from harness.baselines import attention
from harness.baselines.vit import ViT, ViTConfig
from harness.fixtures import functional_modules as modules
from harness.judge.case import Case
from harness.judge.implementation import Implementation
from harness.judge.race import timed_precision
from harness.records.ceilings import Ceilings
from harness.records.speed import Entry, Point
from harness.subjects.videomamba import model as videomamba


@dataclass(frozen=True)
class Baseline(Implementation):
    """A ViT by the name of its attention, or timm's. Nothing here is our product: all are rivals."""

    rival: bool = True

    def absent(self, device: str) -> str | None:
        return timm_missing() if self.name == "timm" else attention.unavailable(self.name, device)

    def missing(self, case: Case) -> str | None:
        if self.name == "timm":
            return None if case.has("image") else "timm has this model for images only"
        if case.torch_dtype not in attention.dtypes(self.name):
            return f"{self.name} does not declare dtype {case.dtype}"
        return None


def cases(grid: str) -> list[Case]:
    """Return clips and images of S pixels, width D in H heads, two layers; frames of the video at the models' own size."""

    def shape(B: int, T: int, S: int, D: int, H: int) -> dict[str, int]:
        return {"B": B, "T": T, "S": S, "D": D, "H": H, "L": 1 + T * (S // 16) ** 2}

    tiny = [
        Case("vit", tuple(shape(1, 2, 32, 4, 2).items()), (), "float64"),
        Case("vit", tuple(shape(1, 1, 32, 4, 2).items()), ("image",), "float64"),
    ]
    small: list[tuple[dict[str, int], tuple[str, ...]]]
    small = [(shape(2, 4, 32, 128, 2), ()), (shape(4, 1, 48, 128, 4), ("image",))]
    own_size = (shape(1, 1, 224, 192, 3), ("image",)), (shape(1, 8, 224, 192, 3), ("video",))
    if grid == "smoke":
        return [*tiny, *modules.in_precisions([*small, (shape(1, 2, 64, 192, 3), ())], "vit", half=False)]
    return [
        *tiny,
        *modules.in_precisions([*small, (shape(2, 8, 64, 192, 3), ())], "vit", half=True),
        *modules.in_precisions([*own_size], "vit", half=True),
    ]


@functools.lru_cache(maxsize=1)
def implementations() -> list[Implementation]:
    """Return the model with naive attention, with PyTorch's choice, with each kernel pinned; then timm's."""

    def call_with(kind: str) -> Callable[..., Any]:
        return lambda config: ViT(ViTConfig(**config, attention=kind))

    kernels = [Baseline(kind, call_with(kind)) for kind in attention.KINDS if kind != "naive"]
    return [Implementation("reference", call_with("naive")), *kernels, Baseline("timm", call_timm)]


def call_timm(config: dict[str, Any]) -> nn.Module:
    """Return timm's own model of an image configuration."""
    theirs = importlib.import_module("timm.models.vision_transformer").VisionTransformer
    return theirs(**{field: value for field, value in config.items() if field != "num_frames"})


@functools.cache
def timm_missing() -> str | None:
    """Return why timm cannot be imported, None if it can: it needs the torchvision that was built for this PyTorch."""
    try:
        importlib.import_module("timm.models.vision_transformer")
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        return f"timm cannot be imported ({reason}): install it with the torchvision that belongs to this PyTorch."
    return None


def config(case: Case) -> dict[str, Any]:
    """Return fields of the model's configuration, without its attention."""
    frames = None if case.has("image") else case["T"]
    return {
        "img_size": case["S"], "num_frames": frames, "num_classes": 10, "embed_dim": case["D"], "depth": 2,
        "num_heads": case["H"],
    }  # fmt: skip


def build(call: Callable[..., Any], case: Case) -> nn.Module:
    """Return the model of a case."""
    return call(config(case))


def draw(case: Case, seed: int) -> dict[str, Tensor]:
    """Draw a clip and a trained model's parameters."""
    module = modules.on_meta(build, implementations()[0].call, case)
    return {"clip": videomamba.clip(case, seed)} | modules.parameters(module, case, seed)


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
    """Return the time of the truth in that of a scan's step: there is no scan."""
    B, L, D = case["B"], case["L"], case["D"]
    return 250 + B * L * D * (12 * D + L) / 3e5


def evaluate(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return logits."""
    model = modules.on_meta(build, call, case)
    with modules.precision(case, leaves):
        return {"logits": modules.call(model, without_key_slopes(leaves), lambda m, x: m(x), leaves["clip"])}


def without_key_slopes(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the leaves, with the keys' biases as constants.

    Such a bias changes all scores of a query alike, which softmax does not see: its slope is 0, and a backward pass finds the
    rounding of a cancellation, in some places exactly 0 by chance.
    """
    cut = {}
    for name, leaf in leaves.items():
        if name.endswith("attn.qkv.bias"):
            query, key, value = leaf.chunk(3)
            cut[name] = torch.cat((query, key.detach(), value))
    return leaves | cut


def contenders(kernel: str | None) -> list[Implementation]:
    """Return naive attention and the box's fastest kernel, both as rivals; all pinned kernels where that is not known."""
    naive, *others = implementations()
    if kernel is None:
        return [i for i in others if i.name in attention.PINNED]
    return [replace(naive, rival=True), *(i for i in others if i.name == kernel)]


def licence(dtype: str) -> tuple[str, ...]:
    """Return the small cases."""
    return (f"B2-T*-H*-{timed_precision(dtype)}",)


def network(point: Point, entry: Entry) -> nn.Module:
    """Return the classifier of the entry's size, for the point's clips."""
    clips = {"img_size": point["S"], "num_frames": point["T"]} if point.clips else {}
    kind = "naive" if entry.implementation == "reference" else entry.implementation
    return ViT(getattr(ViTConfig, entry.variant)(**clips, num_classes=10, attention=kind))


def blocks(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the model's blocks and final norm."""
    assert isinstance(network, ViT)
    return lambda tokens: network.norm(network.encode(tokens))


def bound(point: Point, variant: str, ceilings: Ceilings) -> float:
    """Return the seconds of all matrix products: qkv, proj and the two of the MLP are 12 D^2 a token, attention 2 L D; the
    backward of attention takes 2.5 forwards."""
    config, train = getattr(ViTConfig, variant)(), point.mode == "train"
    D = config.embed_dim
    linear, mixing = 2 * point.tokens * 12 * D * D, 2 * point.tokens * 2 * point["L"] * D
    return config.depth * (linear * (3 if train else 1) + mixing * (3.5 if train else 1)) / ceilings.matmul
