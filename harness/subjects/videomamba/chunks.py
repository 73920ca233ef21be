"""VideoMamba and its encoder on a video that comes in chunks: by states, by `forward_chunked`, frame by frame."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fused
import reference
from harness.fixtures import functional_modules as modules
from harness.fixtures.chains import chain, require_refusal
from harness.judge.case import Case
from harness.subjects.videomamba.model import build, tubelet


def num_units(case: Case) -> int:
    """Return the tubelets of a video that is cut; embedded tokens, where no readout is named, are cut anywhere."""
    return case["T"] // tubelet(case) if cut_by_tubelets(case) else case["L"]


def cut_by_tubelets(case: Case) -> bool:
    """Return whether it is the video that is cut."""
    return case.has("state") and case.option("readout", "") != ""


def time_axes(case: Case) -> dict[str, int]:
    """Return axis 2 of frames, axis 1 of tokens and their logits. Where embedded tokens are cut, the clip is not."""
    if not cut_by_tubelets(case):
        return {"tokens": 1}
    return {"clip": 2} | ({"logits": 1} if case.option("readout", "") == "tokens" else {})


def forward_chunked(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor], frames: int) -> dict[str, Tensor]:
    """Return logits, by `forward_chunked`."""
    model = modules.on_meta(build, call, case)
    with modules.precision(case, leaves):
        return {"logits": modules.call(model, leaves, run_forward_chunked(frames), leaves["clip"])}


def run_forward_chunked(frames: int, **options: Any) -> Callable[[Any, Tensor], Any]:
    """Return `forward_chunked` of either package as a function of a model and a clip."""

    def run(model: Any, clip: Tensor) -> Any:
        if isinstance(model, reference.VideoMamba | reference.VideoMambaEncoder):
            return reference.forward_chunked(model, clip, frames, **options)
        return model.forward_chunked(clip, chunk_frames=frames, **options)

    return run


def chunk_frames(case: Case) -> list[int]:
    """Return one tubelet, and more than half of the clip, so that the last chunk is shorter; none where the scan does not take
    frame after frame."""
    size = tubelet(case)
    count = case["T"] // size
    if count < 2 or case.has("image", "one", "mask", "state") or case.option("order", "spatial") != "spatial":
        return []
    return [size, (count // 2 + 1) * size] if count > 2 else [size]


def chunked(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor], cuts: tuple[int, ...]) -> dict[str, Tensor]:
    """Return the outputs of a video, or of its embedded tokens, sent through all layers chunk by chunk."""

    def of_tokens(model: Any, clip: Tensor) -> tuple[dict[str, Tensor], Any]:
        tokens = model.embed(clip)

        def step(start: int, stop: int, state: Any) -> tuple[Tensor, Any]:
            return model.encode(tokens[:, start:stop], state=state, return_state=True)[:2]

        outputs, state = chain(step, cuts, case["L"], None)
        return {"tokens": torch.cat(outputs, dim=1)}, state

    def of_tubelets(model: Any, clip: Tensor) -> tuple[dict[str, Tensor], Any]:
        outputs, state = run_in_chunks(model, case, clip, cuts, num_units(case), {})
        return {"logits": torch.cat(outputs, dim=1) if case.option("readout", "") == "tokens" else outputs[-1]}, state

    model = modules.on_meta(build, call, case)
    with modules.precision(case, leaves):
        run = of_tubelets if cut_by_tubelets(case) else of_tokens
        outputs, states = modules.call(model, leaves, run, leaves["clip"])
    return outputs | named_states(states)


def run_in_chunks(
    model: Any, case: Case, clip: Tensor, cuts: tuple[int, ...], count: int, options: dict[str, Callable[[int, int], Any]]
) -> tuple[list[Any], Any]:
    """Return the outputs of the chunks of `count` tubelets, and the last state; without cuts, of the video at once.

    `options` are further keywords of the model, as functions of the first tubelet and the one after the last.
    """
    t, total = tubelet(case), count if case.has("stretch") else None

    def step(start: int, stop: int, state: Any) -> tuple[Any, Any]:
        if len(cuts) == 1:
            return model(clip, return_state=True, temporal_pos_total=total, **{k: v(start, stop) for k, v in options.items()})
        if start:
            require_refusal(run, start, stop, state)
        return run(start, stop, state)

    def run(start: int, stop: int, state: Any) -> tuple[Any, Any]:
        return model(
            clip[:, :, t * start : t * stop], **{k: v(start, stop) for k, v in options.items()}, ssm_state=state,
            return_state=True, temporal_pos_offset=start, temporal_pos_total=total,
        )  # fmt: skip

    return chain(step, cuts, count, model.init_state(len(clip)))


def frame_by_frame(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the logits of `evaluate`, by a `FrameStream` that has been used before."""

    def run(model: Any, clip: Tensor) -> list[Tensor]:
        stream = fused.FrameStream(model, len(clip), num_units(case) if case.has("stretch") else None)
        frames = clip.split(tubelet(case), dim=2)
        for frame in reversed(frames):
            stream(frame)
        stream.reset()
        return [stream(frame) for frame in frames]

    model = modules.on_meta(build, call, case)
    training = model.training
    try:
        with modules.precision(case, leaves):
            outputs = modules.call(model.eval(), leaves, run, leaves["clip"])
    finally:
        model.train(training)
    return {"logits": torch.cat(outputs, dim=1) if case.option("readout", "") == "tokens" else outputs[-1]}


def named_states(states: Any) -> dict[str, Tensor]:
    """Return the tensors of a model's state by name; a count, which is no real number, is left out."""
    found = {f"{kind}_state.{i}": x for i, pair in enumerate(states) for kind, x in zip(("conv", "ssm"), pair, strict=True)}
    return {k: x for k, x in found.items() if x.is_floating_point()}
