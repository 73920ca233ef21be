"""Triton kernels with a bug planted in their source."""

import importlib
import sys
from pathlib import Path

from fused.runtime.plans import Planned

KERNELS = ("forward_kernel", "backward_kernel", "reduce_kernel")


def plant(monkeypatch, folder, kernels, launch, right, wrong):
    """Make `launch` use the kernels that module `kernels` defines with `wrong` in place of `right`, for the time of a test.

    Triton reads a kernel's source from its file, so the changed module is written to `folder` and imported from there. Raises
    AssertionError if the source does not contain `right`.
    """
    source = Path(kernels.__file__).read_text()
    assert right in source
    (folder / "planted_kernels.py").write_text(source.replace(right, wrong))
    monkeypatch.syspath_prepend(folder)
    sys.modules.pop("planted_kernels", None)
    planted = importlib.import_module("planted_kernels")
    for name in filter(planted.__dict__.get, KERNELS):
        monkeypatch.setattr(launch, name, getattr(planted, name))
    # on a GPU, a launch plan of an earlier test would launch the sound kernels
    monkeypatch.setattr(Planned, "__call__", lambda planned, *arguments: planned.function(*arguments))
