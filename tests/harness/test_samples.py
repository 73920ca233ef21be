"""The calls of registered operators that subjects give to the check `compile`, under the kernels' emulation."""

import emulation
import pytest
import torch

from harness.judge.registry import subjects

pytest.importorskip("triton", reason="the convolution's and the norm's kernels are Triton's")
CASES = [
    (name, implementation, case)
    for name, subject in subjects().items()
    for implementation in subject.implementations()
    if implementation.samples is not None
    for case in subject.cases("smoke")
    if case.dtype == "float32" and case["L"] <= 17 and not case.has("for")
]


def test_every_operator_subject_gives_calls():
    assert {name for name, _, _ in CASES} == {"scan", "conv", "norm", "ssd"}


@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton 3.6's interpreter
@pytest.mark.parametrize("name, implementation, case", CASES, ids=lambda x: getattr(x, "name", x))
def test_calls_fit_the_operators_schema(name, implementation, case, monkeypatch):
    if reason := emulation.unavailable():
        pytest.skip(reason)
    monkeypatch.setattr("fused.runtime.nvrtc.module", emulation.module)
    leaves = {k: v.float() for k, v in subjects()[name].draw(case, 0).items()}
    for operator, arguments, options in implementation.samples(case, leaves):
        torch.library.opcheck(operator, arguments, options, test_utils=("test_schema", "test_faketensor"))
