"""Operators on more than 2^31 token values: one short clip, expanded to a batch or repeated along the tokens.

The results are known from the one clip. In a batch every clip is that clip. Along the tokens every period is it, because the
steps are so large that exp(delta A) is 0 in float64 too: no token depends on those before. The first input is repeated in
memory, as all results are; the others are expanded, of stride 0. Of each result the least and the greatest value each have
to be right, so that one wrong value anywhere is seen.
"""

import math

import torch
from torch import Tensor

from harness.judge.case import Case
from harness.judge.check import CannotAsk
from harness.judge.implementation import Implementation
from harness.judge.trial import Trial, worst_of
from harness.records.finding import Finding, Tally

BYTES = 12  # of memory for a token value: the first input, y and the gradients of three inputs, in bfloat16
CLIPS, PERIODS = "clips", "periods"


def huge_case(check: str, subject: str, repeated: str, dims: dict[str, int], *options: str) -> Case:
    """Return a case of one clip that is `repeated`, as CLIPS or PERIODS, to a little more than 2^31 token values.

    CLIPS are asked backward too: 24 GiB at the least, up to 100 where PyTorch operations keep float32 between them. A clip's
    size should divide no power of 2: an address that wraps around must not find the same place of another clip.
    """
    size = math.prod(dims.get(letter, 1) for letter in "LED")
    return Case(subject, tuple(dims.items()), (f"{repeated}={2**31 // size + 64}", *options, f"for={check}"), "bfloat16")


def repetitions(case: Case) -> int:
    """Return the number of clips or periods; 0 for a case that is not huge."""
    return int(case.option(CLIPS, "") or case.option(PERIODS, "") or 0)


def judge(trial: Trial, implementation: Implementation) -> list[Finding]:
    """Apply the rule to the least and the greatest value over all clips or periods."""
    require_room(trial)
    tally, grad = Tally(), trial.asks_gradients
    evaluate = in_periods if trial.case.option(PERIODS, "") else in_clips
    for seed in trial.seeds:
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
    """Return the results of the batch that have an entry per clip."""
    count, per_clip = repetitions(trial.case), trial.subject.per_clip(trial.case)
    wide = {k: v.expand(count, *v.shape[1:]) if k in per_clip else v for k, v in trial.leaves(seed).items()}
    first = next(iter(wide))
    wide[first] = wide[first].contiguous()

    def cotangent(name: str, output: Tensor) -> Tensor:
        return trial.cotangent(seed, name, output[:1]).expand_as(output)

    result = trial.run_on_device(implementation, seed, True, wide, cotangent=cotangent)
    return result.outputs | {f"grad {k}": result.gradients[k] for k in wide if k in per_clip}


def in_periods(trial: Trial, implementation: Implementation, seed: int) -> dict[str, Tensor | None]:
    """Return the results of a sequence of one clip; those with tokens period by period, on axis 0."""
    count, axes = repetitions(trial.case), trial.subject.time_axes(trial.case)
    outputs = trial.run_on_device(implementation, seed, False, trial.subject.repeat(trial.leaves(seed), count)).outputs
    return {k: t.unflatten(1, (count, -1))[0] if k in axes else t for k, t in outputs.items()}


def require_room(trial: Trial) -> None:
    """Raise CannotAsk where the device has no room for the inputs and results alone."""
    needed = BYTES * repetitions(trial.case) * trial.subject.output_values(trial.case) / 2**30
    free = torch.cuda.mem_get_info(trial.device)[0] / 2**30 if trial.device.startswith("cuda") else 0
    if free < needed:
        raise CannotAsk(f"needs {needed:.0f} GiB of a GPU's memory and more for what lies between; {free:.0f} GiB are free")
