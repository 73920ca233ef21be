"""The evaluation of a classifier on video files: frames, crops and merging of 4 x 3 views, and the classes of a list."""

import functools
import shutil
import tempfile
from collections.abc import Callable
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fused
from fused.evaluate import Settings
from fused.evaluate import evaluate as evaluate_videos
from fused.io.picture import MEAN, STD
from harness.fixtures import functional_modules as modules
from harness.fixtures.video import write
from harness.judge.case import Case
from harness.judge.implementation import Implementation
from harness.subjects.clips import full_decode, missing_package
from harness.subjects.videomamba.model import implementations_of

LABELS = ("walk", "jump", "sit", "run")  # in the order of the logits, which is no order of a list
CLASS_OF = ("run", "walk", "sit")  # of each video; none jumps
VIEWS, CROPS = 4, 3
HEIGHT, WIDTH = 32, 72  # as high as a crop: frames are not resized
FEWEST_FRAMES = 15


class Reader(Implementation):
    """A model that is asked on video files."""

    def absent(self, device: str) -> str | None:
        """Return why it cannot run: its backend, or PyAV."""
        return super().absent(device) or missing_package("av")


@functools.lru_cache(maxsize=1)
def implementations() -> list[Implementation]:
    """Return the formulas over the reference model, and `fused.evaluate` over each backend."""
    return [Reader(i.name, i.call, i.rival, i.backend, i.table) for i in implementations_of("VideoMamba")]


@functools.cache
def videos() -> tuple[Path, tuple[Path, ...]]:
    """Return a list of video files with their classes, and the files in its order; they last as long as the process."""
    folder = tempfile.mkdtemp(prefix="harness-evaluation-")
    Finalize(None, shutil.rmtree, (folder,), {"ignore_errors": True}, exitpriority=0)  # of worker processes too
    paths = []
    for number in range(len(CLASS_OF)):
        drawn = torch.Generator().manual_seed(number)
        noise = torch.rand(FEWEST_FRAMES + 3 * number, 3, 4, 9, generator=drawn)  # fields of 8 x 8 pixels
        frames = noise.repeat_interleave(8, 2).repeat_interleave(8, 3).permute(0, 2, 3, 1) * 255
        paths.append(write(Path(folder, f"{number}.avi"), frames.to(torch.uint8)))
    list_file = Path(folder, "list.csv")
    list_file.write_text("".join(f"{path},{name}\n" for path, name in zip(paths, CLASS_OF, strict=True)))
    return list_file, tuple(paths)


def cases(grid: str) -> list[Case]:
    """Return nothing: outputs are all that an evaluation has, and `special_cases` asks for them."""
    return []


def special_cases(check: str, grid: str) -> list[Case]:
    """Return a small model in float32 and under autocast, in every grid the same, for the check `forward`."""
    sizes = {"B": len(CLASS_OF), "T": 2, "S": HEIGHT, "D": 32, "L": 1 + 2 * (HEIGHT // 16) ** 2}
    return modules.in_precisions([(sizes, ("infer", "for=forward"))], "evaluation", half=False) if check == "forward" else []


def build(call: Callable[..., Any], case: Case) -> nn.Module:
    """Return the model of a case, in eval mode."""
    sizes = {"img_size": case["S"], "num_frames": case["T"], "embed_dim": case["D"], "depth": 1}
    return call(sizes | {"num_classes": len(LABELS), "drop_path_rate": 0.0}).eval()


def draw(case: Case, seed: int) -> dict[str, Tensor]:
    """Draw the parameters; the head is large enough for views to disagree."""
    drawn = modules.parameters(modules.on_meta(build, implementations()[0].call, case), case, seed)
    return drawn | {"head.weight": 3 * drawn["head.weight"]}


def precise(case: Case) -> set[str]:
    """Return all parameters: autocast does the rounding."""
    return modules.precise(case, modules.on_meta(build, implementations()[0].call, case), set(), set())


def no_cotangent(case: Case) -> set[str]:
    """Return nothing: nothing is differentiated."""
    return set()


def output_values(case: Case) -> int:
    """Return the probabilities, each a mean over views."""
    return len(CLASS_OF) * len(LABELS) * VIEWS * CROPS


def steps(case: Case) -> float:
    """Return the steps of a scan in either direction over all views."""
    return 2 * case["L"] * (1 + len(CLASS_OF) * VIEWS * CROPS * case["D"] * 32 / 20000)


def evaluate(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the probabilities (videos, classes) and the labels, 1 in the column of a video's class."""
    module = modules.on_meta(build, call, case)
    return (by_fused if isinstance(module, fused.VideoMamba) else by_formula)(call, case, leaves)


def by_formula(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what upstream's formulas give: `views_of` each video, and the mean over them of the softmax."""
    head = leaves["head.weight"]
    clips = [clip for path in videos()[1] for clip in views_of(full_decode(path), case["T"], case["S"])]
    x = torch.stack(clips).to(head.device, head.dtype) / 255
    mean, std = (torch.tensor(values, dtype=head.dtype, device=head.device).view(3, 1, 1, 1) for values in (MEAN, STD))
    with modules.precision(case, leaves):
        logits = modules.call(modules.on_meta(build, call, case), leaves, lambda m, c: m(c), (x - mean) / std)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    probabilities = wide.softmax(1).unflatten(0, (-1, VIEWS * CROPS)).mean(1)
    labels = torch.zeros_like(probabilities)
    labels[range(len(CLASS_OF)), [LABELS.index(name) for name in CLASS_OF]] = 1
    return {"probabilities": probabilities, "labels": labels}


def views_of(film: Tensor, T: int, side: int) -> list[Tensor]:
    """Return the views (3, T, side, side) of a film (N, side, W, 3), bytes: clips v of V in time, and of each crops p of P.

    Frame i of a clip is min(round(s i) + floor(s (v + 1) / (V + 1)), N - 1) with s = (N - 1) / T. A crop begins at column
    floor(p free / (P - 1)).
    """
    N, free, found = len(film), film.shape[2] - side, []
    s = (N - 1) / T
    for v in range(VIEWS):
        clip = film[[min(round(s * i) + int(s / (VIEWS + 1) * (v + 1)), N - 1) for i in range(T)]].permute(3, 0, 1, 2)
        lefts = [p * free // (CROPS - 1) for p in range(CROPS)]
        found += [clip[..., left : left + side] for left in lefts]
    return found


def by_fused(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what `fused.evaluate` reports."""
    head = leaves["head.weight"]
    model: Any = build(call, case).to(head.device)
    model.load_state_dict(leaves)
    model.labels = LABELS
    list_file, paths = videos()
    settings = Settings(protocol="k400", workers=0, precision="bfloat16" if case.has("autocast") else "float32")
    lines = {line["video"]: line for line in evaluate_videos(model, list_file, settings=settings).lines}
    rows = [dict(map(tuple, lines[str(path)]["top"])) for path in paths]
    probabilities = torch.tensor([[row[name] for name in LABELS] for row in rows])
    labels = torch.tensor([[float(lines[str(path)]["label"] == name) for name in LABELS] for path in paths])
    return {"probabilities": probabilities.to(head.device), "labels": labels.to(head.device)}
