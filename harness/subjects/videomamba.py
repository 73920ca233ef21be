"""VideoMamba, the classifier."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fused
import reference
from fused.io.video import read_clip
from fused.modules import mamba
from harness.fixtures import functional_modules as modules
from harness.fixtures.video import SHIPPED
from harness.judge.case import Case
from harness.judge.registry import Implementation, fused_implementations
from harness.learning import motion
from harness.learning import trained_weights as trained

NAMED: dict[str, dict[str, Any]] = {
    "layernorm": {"rms_norm": False}, "unfused": {"fused_add_norm": False}, "tubelet2": {"kernel_size": 2},
    "causal": {"bimamba": False}, "image": {"num_frames": None},
}  # fmt: skip


def cases(grid: str) -> list[Case]:
    """Frames T of S pixels, width D, two layers: random clips and frames of the video, every variant of the model once."""

    def shape(B: int, T: int, S: int, D: int) -> dict[str, int]:
        L = 1 + T * (S // 16) ** 2
        return {"B": B, "T": T, "S": S, "D": D, "L": L}

    drawn: list[tuple[str, ...]] = [(), ("order=both",), ("causal", "state", "readout=mean", "stretch")]
    tiny = [Case("videomamba", tuple(shape(1, 2, 32, 4).items()), o, "float64") for o in drawn]
    variants: list[tuple[str, ...]] = [
        ("layernorm",), ("unfused",), ("tubelet2",), ("order=temporal",), ("order=alternating",), ("order=both",),
        ("causal", "state"),
    ]  # fmt: skip
    small = [(shape(2, 2, 32, 32), v) for v in variants] + [(shape(2, 1, 32, 32), ("image",))]
    streams = [(shape(2, 3, 32, 32), ("readout=last",)), (shape(2, 4, 32, 32), ("readout=tokens", "tubelet2")),
               (shape(1, 4, 64, 192), ("readout=mean", "stretch", "video"))]  # fmt: skip
    small += [(sizes, ("causal", "state", *options)) for sizes, options in streams]
    small.append((fitted(2), ("trained",)))
    if grid == "smoke":
        return [
            *tiny,
            *modules.precisions(small, "videomamba", half=False),
            *modules.precisions([(shape(1, 4, 48, 192), ()), (shape(2, 4, 64, 192), ("video",))], "videomamba", half=False),
        ]
    return [
        *tiny,
        *modules.precisions(small, "videomamba", half=True),
        *modules.precisions([(shape(2, 8, 64, 192), ()), (shape(2, 8, 64, 384), ("video",))], "videomamba", half=True),
        *modules.precisions([(shape(2, 8, 64, 192), ("causal", "state", "readout=tokens", "video"))], "videomamba", half=True),
        *modules.precisions([(shape(2, 8, 224, 192), ("video",)), (shape(2, 8, 224, 576), ())], "videomamba", half=False),
        Case("videomamba", tuple(shape(1, 12, 128, 192).items()), ("cast",), "bfloat16"),  # 7 frames are cut by native kernels
    ]


def fitted(B: int) -> dict[str, int]:
    """Sizes of the cases with fitted weights."""
    T, S, D = (motion.TASK.config[k] for k in ("num_frames", "img_size", "embed_dim"))
    return {"B": B, "T": T, "S": S, "D": D, "L": 1 + T * (S // motion.TASK.config["patch_size"]) ** 2}


@functools.lru_cache(maxsize=1)
def implementations() -> list[Implementation]:
    """`VideoMamba` of the reference and of `fused`, by backend."""
    return of_both("VideoMamba")


def of_both(model: str) -> list[Implementation]:
    """The model of this name in the reference and in `fused`, by backend, built from fields of its configuration."""

    def call_with(backend: str) -> Callable[..., Any]:
        return lambda config: getattr(fused, model)(fused.VideoMambaConfig(**config), backend=backend)

    first = Implementation("reference", lambda config: getattr(reference, model)(reference.VideoMambaConfig(**config)))
    return [first, *fused_implementations(mamba.BACKENDS, call_with, every_backend=True)]


def config(case: Case) -> dict[str, Any]:
    """Fields of the model's configuration. Nothing is dropped at random, so that gradients can be compared."""
    if case.has("trained"):
        return trained.read().config
    fields: dict[str, Any] = {
        "img_size": case["S"], "depth": 2, "embed_dim": case["D"], "num_frames": case["T"], "num_classes": 10,
        "drop_path_rate": 0.0, "scan_order": case.option("order", "spatial"),
        "readout": case.option("readout", "tokens" if case.has("causal") else "cls"),
    }  # fmt: skip
    for word in case.options:
        fields |= NAMED.get(word, {})
    return fields | ({"num_frames": case["T"] // 2} if case.has("stretch") else {})


def build(call: Callable[..., Any], case: Case) -> nn.Module:
    """The model of a case."""
    return call(config(case))


def draw(case: Case, seed: int) -> dict[str, Tensor]:
    """A clip and parameters: fitted ones, or drawn in a trained model's range."""
    if case.has("trained"):
        return {"clip": clip(case, seed)} | {k: v.double() for k, v in trained.read().weights.items()}
    module = modules.on_meta(build, implementations()[0].call, case)
    return {"clip": clip(case, seed)} | modules.parameters(module, case, seed)


def clip(case: Case, seed: int) -> Tensor:
    """(B, C, T, S, S): normal numbers, or frames from another part of the video for each seed and clip, or moving digits."""
    B, T, S = case["B"], case["T"], case["S"]
    if case.has("trained"):
        return motion.clips(trained.read().pixels, case.generator(seed, "clip"), B)[0].double()
    if case.has("image"):
        return case.normal(seed, "clip", B, 3, S, S)
    if not case.has("video"):
        return case.normal(seed, "clip", B, 3, T, S, S)
    starts = [(seed * B + b) / (8 * B) for b in range(B)]
    path = case.video or SHIPPED
    return torch.stack([read_clip(path, T, S, start=s, stop=s + 0.5) for s in starts]).double()


def precise(case: Case) -> set[str]:
    """See `harness.fixtures.functional_modules.precise`."""
    return modules.precise(case, modules.on_meta(build, implementations()[0].call, case), {"clip"}, set())


def silent(case: Case) -> set[str]:
    """Every output has a cotangent."""
    return set()


def steps(case: Case) -> float:
    """Two layers of two scans, twice as many in both orders."""
    return case["L"] * (1 + case["B"] * case["D"] * 32 / 20000) * (8 if case.option("order", "") == "both" else 4)


def pieces(case: Case) -> int:
    """A model is cut between tubelets; embedded tokens, where no readout is named, anywhere."""
    return case["T"] // tubelet(case) if by_tubelets(case) else case["L"]


def by_tubelets(case: Case) -> bool:
    """Whether it is the video that is cut."""
    return case.has("state") and case.option("readout", "") != ""


def tubelet(case: Case) -> int:
    """Frames of a tubelet."""
    return config(case).get("kernel_size", 1)


def time_axes(case: Case) -> dict[str, int]:
    """Frames on axis 2, tokens and their logits on axis 1. Where embedded tokens are cut, the clip is asked whole."""
    if not by_tubelets(case):
        return {"tokens": 1}
    return {"clip": 2} | ({"logits": 1} if case.option("readout", "") == "tokens" else {})


def evaluate(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits; in a causal model also every layer's states, and where no readout is named the final tokens for logits."""
    if case.has("state"):
        return chunked(call, case, leaves, (0,))
    model = modules.on_meta(build, call, case)
    with modules.precision(case, leaves):
        return {"logits": modules.call(model, leaves, lambda m, x: m(x), leaves["clip"])}


def in_chunks(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor], frames: int) -> dict[str, Tensor]:
    """Logits, by `forward_chunked`."""
    model = modules.on_meta(build, call, case)
    with modules.precision(case, leaves):
        return {"logits": modules.call(model, leaves, by_chunks(frames), leaves["clip"])}


def by_chunks(frames: int, **options: Any) -> Callable[[Any, Tensor], Any]:
    """`forward_chunked` of either package as a function of a model and a clip."""

    def run(model: Any, clip: Tensor) -> Any:
        if isinstance(model, reference.VideoMamba | reference.VideoMambaEncoder):
            return reference.forward_chunked(model, clip, frames, **options)
        return model.forward_chunked(clip, chunk_frames=frames, **options)

    return run


def chunk_frames(case: Case) -> list[int]:
    """One tubelet, and more than half of the clip, so that the last chunk is shorter; of what walks frame after frame."""
    tubelet = config(case).get("kernel_size", 1)
    count = case["T"] // tubelet
    if count < 2 or case.has("image", "one", "mask", "state") or case.option("order", "spatial") != "spatial":
        return []
    return [tubelet, (count // 2 + 1) * tubelet] if count > 2 else [tubelet]


def chunked(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor], cuts: tuple[int, ...]) -> dict[str, Tensor]:
    """A video, or its embedded tokens, sent through all layers chunk by chunk."""

    def of_tokens(model: Any, clip: Tensor) -> tuple[dict[str, Tensor], Any]:
        tokens = model.embed(clip)

        def step(start: int, stop: int, state: Any) -> tuple[Tensor, Any]:
            return model.encode(tokens[:, start:stop], state=state, return_state=True)[:2]

        outputs, state = modules.chained(step, cuts, case["L"], None)
        return {"tokens": torch.cat(outputs, dim=1)}, state

    def of_tubelets(model: Any, clip: Tensor) -> tuple[dict[str, Tensor], Any]:
        outputs, state = stream(model, case, clip, cuts, {})
        return {"logits": torch.cat(outputs, dim=1) if case.option("readout", "") == "tokens" else outputs[-1]}, state

    model = modules.on_meta(build, call, case)
    with modules.precision(case, leaves):
        run = of_tubelets if by_tubelets(case) else of_tokens
        outputs, states = modules.call(model, leaves, run, leaves["clip"])
    return outputs | named(states)


def stream(
    model: Any, case: Case, clip: Tensor, cuts: tuple[int, ...], how: dict[str, Callable[[int, int], Any]]
) -> tuple[list[Any], Any]:
    """Outputs of the chunks and the last state; the whole at once for no cuts. `how` are more keywords, by tubelets."""
    t, total = tubelet(case), pieces(case) if case.has("stretch") else None

    def step(start: int, stop: int, state: Any) -> tuple[Any, Any]:
        if len(cuts) == 1:
            return model(clip, return_state=True, temporal_pos_total=total, **{k: v(start, stop) for k, v in how.items()})
        if start:
            modules.refuses(ask, start, stop, state)
        return ask(start, stop, state)

    def ask(start: int, stop: int, state: Any) -> tuple[Any, Any]:
        return model(
            clip[:, :, t * start : t * stop], **{k: v(start, stop) for k, v in how.items()}, ssm_state=state,
            return_state=True, temporal_pos_offset=start, temporal_pos_total=total,
        )  # fmt: skip

    return modules.chained(step, cuts, pieces(case), model.init_state(len(clip)))


def framewise(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The logits that `evaluate` gives, by a `FrameStream` that has been used before."""

    def run(model: Any, clip: Tensor) -> list[Tensor]:
        stream = fused.FrameStream(model, len(clip), pieces(case) if case.has("stretch") else None)
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


def named(states: Any) -> dict[str, Tensor]:
    """The tensors of a model's state under names; a count, which is no real number, is left out."""
    found = {f"{kind}_state.{i}": x for i, pair in enumerate(states) for kind, x in zip(("conv", "ssm"), pair, strict=True)}
    return {k: x for k, x in found.items() if x.is_floating_point()}
