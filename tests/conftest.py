"""For every test: one thread, Triton interpreted where there is no GPU, and shapes in the signatures of models checked."""

import importlib
import os
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from jaxtyping import config, install_import_hook

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
# `harness mutants` asks without the check first: it is most of the time that an import takes.
CHECKED = [] if os.environ.get("UNCHECKED_SIGNATURES") else ["reference", "fused", "harness.baselines"]
finder = install_import_hook(CHECKED, "beartype.beartype").hook
instruments = finder.should_instrument
# Triton compiles a kernel from its source and globals, which a checking wrapper would hide; a schedule is the least of many
UNCHECKED = ("kernels", "_kernel", "launch", "schedule")
finder.should_instrument = lambda name: not name.endswith(UNCHECKED) and instruments(name)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Operations this small only wait for each other on two; a parity run within an earlier test may have set more."""
    torch.set_num_threads(1)


@pytest.fixture(params=["reference", "fused"])
def package(request: pytest.FixtureRequest) -> ModuleType:
    """Each of the two packages of models."""
    return importlib.import_module(request.param)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the check of signatures, to see what the function itself says of wrong input."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture
def nan_filled() -> Iterator[None]:
    """torch.empty gives NaN: what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
