"""The compilers with which the limits on registers and spills were measured. A limit decides for these versions alone.

Another version allocates registers in another way. Kernels that go over a limit there still give the same results, so that the
tests warn of them, and pytest lists the warnings at its end.
"""

import warnings

import pytest
import triton

from fused.runtime import cuda_module

MEASURED_WITH = {"Triton": "3.6.0", "NVRTC": "13.5"}  # as in constraints-cpu.txt


def version(compiler: str) -> str:
    """Return the version of Triton or NVRTC that compiles here."""
    if compiler == "Triton":
        return triton.__version__
    return "{}.{}".format(*cuda_module.bindings("nvrtc").nvrtcVersion()[1:])


def fail_or_warn(compiler: str, over: list[str]) -> None:
    """Fail if `over`, what is over its limit, is not empty; only warn if the limits were measured with another version."""
    if not over:
        return
    here, measured = version(compiler), MEASURED_WITH[compiler]
    if here == measured:
        pytest.fail(f"over the limits of {compiler} {measured}: " + "; ".join(over))
    warnings.warn(f"{compiler} {here} goes over limits that were measured with {measured}: " + "; ".join(over), stacklevel=1)
