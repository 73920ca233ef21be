"""`python -m harness list` and `doctor`."""

import sys

import torch
import typer

import fused
from fused import backends
from fused.ops.selective_scan import schedule
from fused.ops.selective_scan.path import path_of
from harness.judge import registry
from harness.judge.check import checks
from harness.judge.request import GRIDS, default_device
from harness.runs import acceptance, environment, freshness, tested
from harness.runs.conclude import UNFIT
from harness.runs.store import Run

SCANNED = ((1, 1569), (8, 1569), (1, 9409), (1, 12_545))  # clips and tokens whose path `doctor` says


def list_all() -> None:
    """List subjects with their implementations, checks, grids, planted bugs."""
    for name, subject in registry.subjects().items():
        print(f"{name:11} {registry.title(subject)}")
        for implementation in subject.implementations():
            reason = implementation.absent(default_device())
            print(f"    {implementation.name:26} {implementation.role:6} {f'not here: {reason}' if reason else 'runs here'}")
        print("    cases: " + ", ".join(f"{len(subject.cases(grid))} {grid}" for grid in GRIDS))
    for what, modules in (("checks", checks()), ("planted bugs (--mutant)", registry.mutants())):
        print(f"{what}:")
        for name, module in modules.items():
            print(f"    {name:22} {registry.title(module)}")


def doctor() -> None:
    """Say what this box can judge, whether its packages are tested versions, and which accepted runs are of older code.

    Exits 4 if it cannot judge at all.
    """
    environment.prepare()
    box = environment.describe(default_device())
    for key, value in box.items():
        print(f"{key:16} {value}")
    print(f"{'fused':16} {environment.imported_from('fused')}")
    for backend in backends.BACKENDS:
        print(f"{'backend':16} {backend}: {backends.unavailable(backend, default_device()) or 'runs here'}")
    for line in scan_paths(default_device()):
        print(f"{'scan':16} {line}")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        print(f"{'validated':16} {dtype}: {fused.validation(dtype=dtype) or 'no (run: nox -s parity)'}")
    for package, verdict in tested.judge_installed(tested.read()).items():
        print(f"{'tested':16} {package} {verdict}")
    for path in sorted(acceptance.ACCEPTED.glob("*/*/run.json")):
        print(f"{'accepted':16} {path.parent.name} {freshness.in_words(freshness.changed_since(Run.open(path.parent)))}")
    require_fit()


def scan_paths(device: str) -> list[str]:
    """Return the path of VideoMamba-M's scans through the native kernels, a line for each number of clips and tokens."""
    if backends.unavailable("native", device):
        return []
    E, processors = 2 * fused.VideoMambaConfig.middle().embed_dim, schedule.multiprocessors(torch.device(device))
    lines = []
    for B, L in SCANNED:
        for what, gradients in (("inference", False), ("training", True)):
            path = path_of(B, L, E, torch.bfloat16, processors, gradients=gradients)
            lines.append(f"VideoMamba-M, {what}, bfloat16, {B} x {L:,} tokens: {path}")
    return lines


def require_fit() -> None:
    """Exit 4 with the reasons if this box cannot judge."""
    if reasons := environment.unfit():
        print("\n".join(f"unfit: {reason}" for reason in reasons), file=sys.stderr)
        raise typer.Exit(UNFIT)
