"""Do values at the edge of what numbers can be, and sequences at the edge of what memory can hold, keep to the rule?

- `delta=huge`, `tiny`, `negative` (all before the softplus), `A=zero`, `A=huge`, `z=huge`, `denormal`: every other channel of
  a scan is such, and results are judged channel by channel, even and odd, so that large ones do not hide small ones. Only
  where values are denormal (`negative`, `denormal`) they may: hardware may take them for 0, and the whole tensor is judged.
- `nan`: one NaN in an input makes NaN of exactly those outputs of which it makes NaN in the reference, and of at least those
  gradients: never a plausible number.
- `length`: the error of a scan grows with its length as it does in the reference. The clips of a batch are the seeds, truth
  and plain are computed on the CPU, which takes a long loop of small steps faster. Gradients of parameters, which sum over
  the clips, are asked by `backward`.
"""

import math
from types import ModuleType

import torch
from torch import Tensor

from harness.judge.case import Case, cross
from harness.judge.registry import Implementation, subjects
from harness.judge.trial import Named, Trial, worst_of
from harness.records.finding import Finding, Tally

WORDS = ("delta=huge", "delta=tiny", "delta=negative", "A=zero", "A=huge", "z=huge", "denormal")
SINGLE = ("delta=huge", "delta=tiny", "A=zero")  # also with one token
BLURRED = ("delta=negative", "denormal")  # judged as a whole
CHANNELS = {"u": 2, "delta": 2, "z": 2, "y": 2, "A": 0, "D": 0, "delta_bias": 0, "final_state": 1}


def cases(grid: str) -> list[Case]:
    """Short ones, just large enough to need few seeds, and lengths up to that of 512 frames: forward in `full`, backward in
    `long` only, where truth and plain take a CPU 8 minutes together."""
    low = ["bfloat16"] if grid == "smoke" else ["bfloat16", "float16"]
    dtypes, lengths = ["float32", *low], [393, 1569, 6273] if grid == "smoke" else [1569, 6273, 25089, 100353]
    long = [{"B": 4, "L": L, "E": 8, "N": 4} for L in lengths]

    def points(subject: str, dims: dict[str, int], words: tuple[str, ...], dtypes: list[str] = dtypes) -> list[Case]:
        return cross(subject, [dims], [(*word.split(), "for=extremes") for word in words], dtypes)

    return [
        *points("scan", {"B": 8, "L": 9, "E": 58, "N": 4}, WORDS),
        *points("scan", {"B": 64, "L": 1, "E": 66, "N": 4}, SINGLE),
        *points("scan", {"B": 2, "L": 9, "E": 6, "N": 4}, ("nan", "nan reverse")),
        *points("conv", {"B": 2, "L": 9, "E": 6, "K": 4}, ("nan", "nan reverse")),
        *points("norm", {"B": 2, "L": 9, "D": 33}, ("nan kind=rms", "nan kind=layer")),
        *(c for dims in long for c in points("scan", dims, ("length infer",))),
        *(c for dims in long[:2] for c in points("scan", dims, ("length",), ["float32", "bfloat16"])),
        *(c for dims in long[2 : {"smoke": 2, "full": 3}.get(grid)] for c in points("scan", dims, ("length",), ["float32"])),
    ]


def draw(case: Case, seed: int) -> Named:
    """The subject's leaves, every other channel of them extreme; what would overflow in float16 is less so there."""
    x: Named = subjects()[case.subject].draw(case, seed)
    half = case.dtype == "float16"

    def between(low: float, high: float, name: str) -> Tensor:
        return case.log_uniform(seed, f"extreme {name}", low, high, *x[name].shape)

    if case.has("delta=huge"):
        extreme = {"delta": between(250, 300, "delta") if half else between(1e3, 1e4, "delta")}  # exp(delta A) is 0 in float32
    elif case.has("delta=tiny"):
        extreme = {"delta": -between(8, 40, "delta"), "D": torch.zeros_like(x["D"]), "delta_bias": 0 * x["delta_bias"]}
    elif case.has("delta=negative"):
        extreme = {"delta": -between(1e2, 1e4, "delta")}
    elif case.has("A=zero"):
        extreme = {"A": -between(1e-12, 1e-6, "A")}
    elif case.has("A=huge"):
        extreme = {"A": -between(1e7, 1e9, "A")}
    elif case.has("z=huge"):
        extreme = {"z": x["z"].sign() * between(100, 300 if half else 3e4, "z")}
    elif case.has("denormal"):
        extreme = {"u": x["u"] * (1e-6 if half else 1e-39)}
    elif case.has("length"):
        # A memory of 10,000 tokens. Ten times as long, an exp2 that errs by half a roundoff to one side at every token would
        # exceed the rule fourfold (emulated); one that errs by two roundoffs to either side keeps to it.
        extreme = {"A": x["A"] / 10}
    else:
        return x
    axes = {name: (torch.arange(x[name].shape[CHANNELS[name]]) % 2 == 1, CHANNELS[name]) for name in extreme}
    odd = {k: mask.view([-1 if i == axis else 1 for i in range(x[k].dim())]) for k, (mask, axis) in axes.items()}
    return x | {k: torch.where(odd[k], value, x[k]) for k, value in extreme.items()}


def asks(subject: ModuleType, implementation: Implementation, case: Case) -> bool:
    """Of everything but the reference, in the cases above."""
    return implementation.name != "reference" and case.asker == "extremes"


def run(trial: Trial, implementation: Implementation) -> list[Finding]:
    """What the case's word asks."""
    if trial.case.has("nan"):
        return poisoned(trial, implementation)
    if trial.case.has("length"):
        return by_clip(trial, implementation)
    if trial.case.has(*BLURRED):
        return trial.judge(implementation, grad=True)
    tally = Tally()
    for seed in trial.case.seeds:
        plain, truth = trial.plain(seed, True).named(), trial.truth(seed, True).named()
        got = trial.got(implementation, seed, True).named()
        for name, exact in truth.items():
            axis = CHANNELS.get(name.removeprefix("grad "))
            for first, part in enumerate(("", "") if axis is None else ("[even]", "[odd]")):
                tally.add(name + part, *(every_other(t, axis, first) for t in (got.get(name), plain[name], exact)))
    return worst_of(tally.findings())


def every_other(tensor: Tensor | None, axis: int | None, first: int) -> Tensor | None:
    """Every other channel, from the first or the second one on; all of what has no channels."""
    if tensor is None or axis is None:
        return tensor
    return tensor.movedim(axis, 0)[first::2]


def by_clip(trial: Trial, implementation: Implementation) -> list[Finding]:
    """The rule, pooled over the clips of one batch."""
    tally, grad, having = Tally(), trial.asks_gradients, trial.subject.clips(trial.case)
    plain, truth = trial.on_cpu.plain(0, grad).named(), trial.on_cpu.truth(0, grad).named()
    got = trial.got(implementation, 0, grad).named()
    for name, exact in truth.items():
        if name.startswith("grad ") and name.removeprefix("grad ") not in having:
            continue
        for clip in range(trial.case["B"]):
            tally.add(name, *(None if t is None else t[clip] for t in (got.get(name), plain[name], exact)))
    return tally.findings()


def poisoned(trial: Trial, implementation: Implementation) -> list[Finding]:
    """One NaN at a time, in the first clip or channel and the middle token: where it has to come out."""
    found = []
    for name in trial.leaves(0):
        plain, got = (
            trial.run(who, 0, True, with_nan(trial.leaves(0), name)).named() for who in (trial.reference, implementation)
        )
        for result, due in plain.items():
            come = got.get(result)
            if due is None or come is None:
                missing, stray = float(due is not None and bool(due.isnan().any())), 0.0
            else:
                missing, stray = float((due.isnan() & ~come.isnan()).sum()), float((come.isnan() & ~due.isnan()).sum())
            what = f"{result}[NaN in {name}]"
            found.append(Finding(what, "nan", missing, 0.0, note="elements that are numbers, not NaN"))
            if result in trial.plain(0, True).outputs:
                found.append(Finding(what, "stray", stray, 0.0, note="elements that are NaN, not numbers"))
    return found


def with_nan(leaves: Named, name: str) -> Named:
    """The leaves with one NaN: in the middle of the tokens, first in all else."""
    place = [0] * leaves[name].dim()
    if leaves[name].dim() == 3:
        place[1] = leaves[name].shape[1] // 2
    leaves[name][tuple(place)] = math.nan
    return leaves
