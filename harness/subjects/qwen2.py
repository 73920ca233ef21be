"""Stock Qwen2-VL decoder layers, the baseline of Vamba: video tokens have self-attention and feed-forward as text has."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import fused
import reference
from harness.fixtures import functional_modules as modules
from harness.judge.case import Case
from harness.judge.implementation import Implementation
from harness.judge.race import timed_precision
from harness.records.ceilings import Ceilings, element_bytes
from harness.records.speed import Point


def cases(grid: str) -> list[Case]:
    """Return two layers over L tokens of width D, H heads in G groups."""
    small = {"B": 2, "L": 9, "D": 32, "H": 4, "G": 2}
    return modules.in_precisions([(small, ())], "qwen2", half=grid != "smoke")


@functools.lru_cache(maxsize=1)
def implementations() -> list[Implementation]:
    """Return the layers with naive attention, and with PyTorch's best; nothing here is our product."""
    return [
        Implementation("reference", lambda case: stock(reference, **sizes(case))),
        Implementation("sdpa", lambda case: stock(fused, **sizes(case)), rival=True),
    ]


def sizes(case: Case) -> dict[str, Any]:
    """Return the configuration's fields for a case."""
    half = case["D"] // case["H"] // 2
    return {
        "vocab_size": 2, "hidden_size": case["D"], "intermediate_size": 2 * case["D"], "num_hidden_layers": 2,
        "num_attention_heads": case["H"], "num_key_value_heads": case["G"], "mrope_section": (half - 2, 1, 1),
    }  # fmt: skip


def stock(package: Any, **fields: Any) -> nn.Module:
    """Return the layers: those of a Vamba without a video, without its cross-attention, mixers and alpha."""
    without = {"use_alpha_balancing": False, "mixer": {"headdim": 2, "d_state": 1}}
    model = package.Vamba(package.VambaConfig(**fields | without))
    for layer in model.model.layers:
        del layer.cross_attn, layer.vision_mixer
    model.lm_head = nn.Identity()
    return model


def build(call: Callable[..., Any], case: Case) -> nn.Module:
    """Return the module of a case."""
    return call(case)


def draw(case: Case, seed: int) -> dict[str, Tensor]:
    """Draw embedded tokens and a trained model's parameters."""
    module = modules.on_meta(build, implementations()[0].call, case)
    return {"hidden": case.normal(seed, "hidden", case["B"], case["L"], case["D"])} | modules.parameters(module, case, seed)


def precise(case: Case) -> set[str]:
    """Return those of `functional_modules.precise`."""
    return modules.precise(case, modules.on_meta(build, implementations()[0].call, case), {"hidden"}, set())


def no_cotangent(case: Case) -> set[str]:
    """Return nothing: every output has a cotangent."""
    return set()


def output_values(case: Case) -> int:
    """Return the values of the tokens."""
    return case["B"] * case["L"] * case["D"]


def steps(case: Case) -> float:
    """Return the time of the truth in that of a scan's step: there is no scan."""
    return 50.0


def evaluate(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tokens after the layers and the final norm."""
    module = modules.on_meta(build, call, case)
    with modules.precision(case, leaves):
        return {"out": modules.call(module, leaves, lambda m, x: m(inputs_embeds=x).logits, leaves["hidden"])}


def licence(dtype: str) -> tuple[str, ...]:
    """Return the small case."""
    return (f"B2-L9-*-{timed_precision(dtype)}",)


def bound(point: Point, variant: str, ceilings: Ceilings) -> float:
    """Return the least seconds of a prefill of text and video, or of its training step: its products, and its weights read."""
    D, tokens, K = point["D"], point["B"] * (point["L"] + point["V"]), point["K"]
    E, keys = (18944, 1024) if D == 3584 else (2 * D, D)
    weights = K * (3 * D * E + 2 * D * D + D * keys)
    passes = 3 if point.mode == "train" else 1
    products = 2.0 * tokens * weights + K * 2.0 * tokens * (tokens / point["B"]) * D  # causal: half of all pairs
    return passes * (products / ceilings.matmul + weights * element_bytes(point.dtype) / ceilings.copy)
