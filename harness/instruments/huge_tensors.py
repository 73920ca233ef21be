"""Operators on more than 2^31 token values: one short clip, expanded to a batch or repeated along the tokens.

What is due is known from the one clip. In a batch every clip is it. Along the tokens every period is it, as its steps are so
large that exp(delta A) is 0 in float64 too: no token knows those before. The first input is repeated in memory, as all
results are; the others are expanded, of stride 0. In the whole of a result the least and the greatest value each have to be
right, so that one wrong value anywhere is seen.
"""

import math

import torch
from torch import Tensor

from harness.judge.case import Case
from harness.judge.registry import CannotAsk, Implementation, subjects
from harness.judge.trial import Named, Trial, worst_of
from harness.records.finding import Finding, Tally

NEEDED = 12  # bytes of memory for a token value: the first input, y and the gradients of three inputs, in bfloat16
CLIPS, PERIODS = "clips", "periods"
FORGET = 2000


def cases(check: str) -> list[Case]:
    """A little more than 2^31 token values each, the batches also backward: 24 GiB at the least, up to 100 where PyTorch
    operations keep float32 between them. A clip's size divides no power of 2: an address that wraps around must not find the
    same place of another clip."""

    def point(subject: str, way: str, dims: dict[str, int], *options: str) -> Case:
        size = math.prod(dims.get(letter, 1) for letter in "LED")
        return Case(subject, tuple(dims.items()), (f"{way}={2**31 // size + 64}", *options, f"for={check}"), "bfloat16")

    scan, conv, norm = {"B": 1, "L": 17, "E": 1008, "N": 1}, {"B": 1, "L": 17, "E": 1008, "K": 4}, {"B": 1, "L": 17, "D": 1008}
    return [
        point("scan", CLIPS, scan), point("scan", CLIPS, scan, "reverse"), point("conv", CLIPS, conv),
        point("norm", CLIPS, norm), point("scan", PERIODS, scan | {"E": 16000}, "infer"),
    ]  # fmt: skip


def is_vast(case: Case) -> bool:
    """Whether the case is one of these."""
    return bool(case.option(CLIPS, "") or case.option(PERIODS, ""))


def draw(case: Case, seed: int) -> Named:
    """The clip, or the period: a step and a gate for each channel, and y as large as ever."""
    leaves: Named = subjects()[case.subject].draw(case, seed)
    if not case.option(PERIODS, ""):
        return leaves
    same = {k: leaves[k][:, :1].expand_as(leaves["u"]) for k in ("delta", "z")}
    return leaves | same | {"delta": same["delta"] + FORGET, "C": leaves["C"] / FORGET}


def judge(trial: Trial, implementation: Implementation) -> list[Finding]:
    """The rule for the least and the greatest value over all clips or periods."""
    require_room(trial.case, trial.device)
    tally, grad = Tally(), trial.asks_gradients
    evaluate = in_periods if trial.case.option(PERIODS, "") else in_clips
    for seed in trial.case.seeds:
        plain, truth = trial.plain(seed, grad).named(), trial.truth(seed, grad).named()
        try:
            results = evaluate(trial, implementation, seed)
        except torch.OutOfMemoryError as error:
            raise CannotAsk(str(error).splitlines()[0]) from error
        for name, tensor in results.items():
            for extreme in (torch.amin, torch.amax):
                value = None if tensor is None else extreme(tensor, 0, keepdim=True).cpu()
                tally.add(f"{name}[{extreme.__name__}]", value, plain[name], truth[name])
        del results, tensor  # before the next seed's
    return worst_of(tally.findings())


def in_clips(trial: Trial, implementation: Implementation, seed: int) -> dict[str, Tensor | None]:
    """Results of the batch that have an entry per clip."""
    count, having = int(trial.case.option(CLIPS, "")), trial.subject.clips(trial.case)
    wide = {k: v.expand(count, *v.shape[1:]) if k in having else v for k, v in trial.leaves(seed).items()}
    first = next(iter(wide))
    wide[first] = wide[first].contiguous()

    def cotangent(name: str, output: Tensor) -> Tensor:
        return trial.cotangent(seed, name, output[:1]).expand_as(output)

    result = trial.run_there(implementation, seed, True, wide, cotangent=cotangent)
    return result.outputs | {f"grad {k}": result.gradients[k] for k in wide if k in having}


def in_periods(trial: Trial, implementation: Implementation, seed: int) -> dict[str, Tensor | None]:
    """y period by period, and the final state."""
    count, leaves = int(trial.case.option(PERIODS, "")), trial.leaves(seed)
    long = leaves | {k: leaves[k].repeat(1, count, 1) for k in ("u", "B", "C")}
    long |= {k: leaves[k][:, :1].expand_as(long["u"]) for k in ("delta", "z")}
    outputs = trial.run_there(implementation, seed, False, long).outputs
    return {"y": outputs["y"].unflatten(1, (count, -1))[0], "final_state": outputs["final_state"]}


def require_room(case: Case, device: str) -> None:
    """Raise CannotAsk where the device has no room for the inputs and results alone."""
    count = int(case.option(CLIPS, "") or case.option(PERIODS, ""))
    sizes = dict(case.dims)
    needed = NEEDED * count * sizes["L"] * sizes.get("E", sizes.get("D", 1)) / 2**30
    free = torch.cuda.mem_get_info(device)[0] / 2**30 if device.startswith("cuda") else 0
    if free < needed:
        raise CannotAsk(f"needs {needed:.0f} GiB of a GPU's memory and more for what lies between; {free:.0f} GiB are free")
