"""VideoMamba, the classifier."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from harness.fixtures import functional_modules as modules
from harness.instruments import short_training
from harness.judge.case import Case
from harness.judge.implementation import Implementation
from harness.learning import trained_weights
from harness.subjects.videomamba import model
from harness.subjects.videomamba.chunks import chunk_frames as chunk_frames
from harness.subjects.videomamba.chunks import chunked as chunked
from harness.subjects.videomamba.chunks import cut_by_tubelets as cut_by_tubelets
from harness.subjects.videomamba.chunks import forward_chunked as forward_chunked
from harness.subjects.videomamba.chunks import frame_by_frame as frame_by_frame
from harness.subjects.videomamba.chunks import num_units as num_units
from harness.subjects.videomamba.chunks import time_axes as time_axes
from harness.subjects.videomamba.grids import cases as cases
from harness.subjects.videomamba.grids import fitted as fitted
from harness.subjects.videomamba.grids import special_cases as special_cases
from harness.subjects.videomamba.model import build as build
from harness.subjects.videomamba.model import random_option as random_option
from harness.subjects.videomamba.model import steps as steps
from harness.subjects.videomamba.timing import blocks as blocks
from harness.subjects.videomamba.timing import bound as bound
from harness.subjects.videomamba.timing import licence as licence
from harness.subjects.videomamba.timing import network as network
from harness.subjects.videomamba.timing import races as races
from harness.subjects.videomamba.training import first_steps as first_steps
from harness.subjects.videomamba.training import learning_rate as learning_rate
from harness.subjects.videomamba.training import needs_teacher as needs_teacher
from harness.subjects.videomamba.training import training_losses as training_losses
from harness.subjects.videomamba.training import training_target as training_target
from harness.subjects.videomamba.training import training_title as training_title
from harness.subjects.videomamba.training import training_words as training_words


@functools.lru_cache(maxsize=1)
def implementations() -> list[Implementation]:
    """Return `VideoMamba` of the reference and of `fused`, by backend."""
    return model.implementations_of("VideoMamba")


def draw(case: Case, seed: int) -> dict[str, Tensor]:
    """Draw a clip and parameters: fitted ones, or drawn in a trained model's range."""
    if case.has("trained"):
        return {"clip": model.clip(case, seed)} | {k: v.double() for k, v in trained_weights.read().weights.items()}
    clip = short_training.clips(case) if case.only_check == "convergence" else model.clip(case, seed)
    return {"clip": clip} | modules.parameters(modules.on_meta(build, implementations()[0].call, case), case, seed)


def precise(case: Case) -> set[str]:
    """Return those of `functional_modules.precise`."""
    return modules.precise(case, modules.on_meta(build, implementations()[0].call, case), {"clip"}, set())


def no_cotangent(case: Case) -> set[str]:
    """Return nothing: every output has a cotangent."""
    return set()


def output_values(case: Case) -> int:
    """Return the values of the final tokens. The logits depend on one token a clip, whose rounding scales all gradients of the
    last layer; in a causal model that carries states, and where every token has logits, on all."""
    return case["B"] * (case["L"] if case.has("state", "readout=tokens") else 1) * case["D"]


def evaluate(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return logits; of a causal model also every layer's states, and where no readout is named the final tokens for logits."""
    if case.has("state"):
        return chunked(call, case, leaves, (0,))
    module = modules.on_meta(build, call, case)
    with modules.precision(case, leaves):
        return {"logits": modules.call(module, leaves, lambda m, x: m(x), leaves["clip"])}
