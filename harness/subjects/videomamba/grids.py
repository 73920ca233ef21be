"""The cases in which VideoMamba is judged."""

from harness.fixtures import functional_modules as modules
from harness.judge.case import Case, cross
from harness.learning import motion


def shape(B: int, T: int, S: int, D: int) -> dict[str, int]:
    """Return the sizes of B clips of T frames of S pixels, width D: L tokens with CLS."""
    return {"B": B, "T": T, "S": S, "D": D, "L": 1 + T * (S // 16) ** 2}


def fitted(B: int) -> dict[str, int]:
    """Return the sizes of the cases with fitted weights."""
    T, S, D = (motion.TASK.config[k] for k in ("num_frames", "img_size", "embed_dim"))
    return {"B": B, "T": T, "S": S, "D": D, "L": 1 + T * (S // motion.TASK.config["patch_size"]) ** 2}


def cases(grid: str) -> list[Case]:
    """Return models of two layers: random clips and frames of the video, every variant of the model once."""
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
            *modules.in_precisions(small, "videomamba", half=False),
            *modules.in_precisions([(shape(1, 4, 48, 192), ()), (shape(2, 4, 64, 192), ("video",))], "videomamba", half=False),
        ]
    # 8,233 tokens, with which the native scan's state passes sum by moments: one output a token shows them all
    kinds: list[tuple[str, ...]] = [(), ("fresh",), (modules.LONG_MEMORY,)]
    long = [(*kind, "readout=tokens", "infer", "cast") for kind in kinds]
    streamed = (shape(2, 8, 64, 192), ("causal", "state", "readout=tokens", "video"))
    return [
        *tiny,
        *modules.in_precisions(small, "videomamba", half=True),
        *modules.in_precisions([(shape(2, 8, 64, 192), ()), (shape(2, 8, 64, 384), ("video",))], "videomamba", half=True),
        *modules.in_precisions([streamed], "videomamba", half=True),
        *modules.in_precisions([(shape(2, 8, 224, 192), ("video",)), (shape(2, 8, 224, 576), ())], "videomamba", half=False),
        Case("videomamba", tuple(shape(1, 12, 128, 192).items()), ("cast",), "bfloat16"),  # native kernels split 7 frames
        *cross("videomamba", [shape(1, 42, 224, 32)], long, ["bfloat16"]),
    ]


def special_cases(check: str, grid: str) -> list[Case]:
    """Return the cases that only one check asks.

    `compile` takes a small model. `convergence` trains a classifier of two frames, in grid `smoke` in float32 only.
    `forward_approximate` takes frames of the video. `long` takes a minute of them in grid `smoke` and an hour in grid `long`;
    one draw is enough, as there is an output for every token. `processes` fine-tunes; it is too slow for grid `smoke`.
    """
    if check == "compile":
        return modules.in_precisions([(shape(2, 2, 32, 32), ("for=compile",))], "videomamba", half=False)
    if check == "convergence":
        found = modules.in_precisions(
            [(shape(12, 2, 32, 16), ("video", "steps=60", "for=convergence"))], "videomamba", half=False
        )
        return found[:1] if grid == "smoke" else found
    if check == "forward_approximate":
        sizes = shape(1, 4, 32, 32) if grid == "smoke" else shape(1, 16, 64, 192)
        return modules.in_precisions([(sizes, ("video", "infer", "for=forward_approximate"))], "videomamba", half=False)
    if check == "long" and grid in ("smoke", "long"):
        sizes = shape(1, 3600, 224, 192) if grid == "long" else shape(1, 64, 32, 32)
        found = modules.in_precisions([(sizes, ("readout=tokens", "infer", "for=long"))], "videomamba", half=False)
        return found if grid == "long" else found[:1]
    if check == "processes" and grid != "smoke":
        return [Case("videomamba", tuple(shape(4, 2, 32, 32).items()), ("video", "for=processes"))]
    return []
