"""The judge's questions that need a GPU, one by one: they find the planted bugs that a CPU cannot show."""

import contextlib
import fcntl
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from rule import assert_rule
from torch import Tensor

import fused
from fused.runtime import plans
from harness.bench.clock import Call, Clock
from harness.judge import trial
from harness.judge.parity import Judge
from harness.judge.request import ParityRequest
from harness.runs import environment

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BOTH = ("forward", "backward")
SIMPLE = [  # subject, checks, cases
    ("scan", BOTH, "B3-L7-E10-N16-reverse-state-*"), ("scan", BOTH, "B2-L33-E12-N40-state-*"),
    ("scan", BOTH, "B2-L65-E40-N64-reverse-state-*"), ("scan_both", BOTH, "B3-L17-E10-N16-*"),
    ("scan", ("writes",), "B3-L7-E10-N16-state-bfloat16"), ("scan", ("strides",), "B3-L19-E74-N16-*"),
    ("scan", ("determinism",), "B3-L7-E10-N16-state-bfloat16"),
    ("conv", BOTH, "B3-L7-E16-K4-reverse-state-*"), ("conv", BOTH, "B1-L63-E24-K2-*"), ("conv", ("strides",), "B3-L19-E74-*"),
    ("norm", BOTH, "B2-L9-D33-*"), ("norm", ("strides",), "B3-L19-D75-*"),
    ("ssd", BOTH, "B2-L65-H5-P24-N40-*"), ("mixer", BOTH, "B2-L9-D32-*"), ("mamba2", BOTH, "B2-L9-D16-P8-N16-state-*"),
]  # fmt: skip
HUGE = [
    ("scan", "*clips=125384-for=strides-*"), ("scan", "*periods=*"), ("conv", "*clips=*"), ("norm", "*clips=*"),
    ("ssd", "*clips=*"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def prepared() -> Iterator[None]:
    """The settings under which parity judges."""
    environment.prepare()
    yield
    torch.use_deterministic_algorithms(False)


def ask(subject: str, checks: tuple[str, ...], cases: str) -> None:
    request = ParityRequest("full", "cuda", (subject,), checks, ("fused:native",), cases=(cases,))
    judge = Judge(request, None)
    try:
        records = [r for case in request.selected_cases() for r in judge.answers(case, set())]
    finally:
        judge.second_process.close()
    assert records and not [(r.command, r.reason, r.worst) for r in records if r.status != "pass"]


@pytest.mark.parametrize(("subject", "checks", "cases"), SIMPLE, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_a_question(subject: str, checks: tuple[str, ...], cases: str) -> None:
    ask(subject, checks, cases)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Wait until no other process asks for most of the GPU's memory."""
    with (Path(tempfile.gettempdir()) / "huge-tensors.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.mark.parametrize(("subject", "cases"), HUGE)
def test_more_than_two_to_the_31st_elements(subject: str, cases: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one draw: a wrong address is wrong by more than rounding."""
    monkeypatch.setattr(trial, "seeds", lambda case: range(1))
    with alone():
        ask(subject, ("strides",), cases)


def scanned(backend: str, dtype: torch.dtype, leaves: dict[str, Tensor], call: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Return the result of a scan and its gradients."""
    given = {k: v.to("cuda", dtype).requires_grad_() for k, v in leaves.items() if k != "dy"}
    y = call(given, backend)
    y.backward(leaves["dy"].to("cuda", dtype))
    return {"y": y.detach()} | {k: v.grad for k, v in given.items() if v.grad is not None}


def one(x: dict[str, Tensor], backend: str) -> Tensor:
    return fused.selective_scan(x["u"], x["delta"], -x["A"].exp(), x["B"], x["C"], x["D"], x["z"], backend=backend)[0]


def both(x: dict[str, Tensor], backend: str) -> Tensor:
    pairs = [(t, t) for t in (x["u"], x["delta"], -x["A"].exp(), x["B"], x["C"], x["D"])]
    return fused.bidirectional_scan(*pairs, x["z"], backend=backend)


def leaves_of(clips: int, tokens: int, channels: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = dict.fromkeys(("u", "delta", "z", "dy"), (clips, tokens, channels)) | dict.fromkeys("BC", (clips, tokens, 16))
    return {k: torch.randn(s, generator=generator) for k, s in (shapes | {"A": (channels, 16), "D": (channels,)}).items()}


@pytest.mark.parametrize("call", [one, both])
@pytest.mark.parametrize(("clips", "tokens", "channels"), [(1, 4000, 192), (48, 400, 384)])
def test_blocks_hand_on_the_same_every_time(call: Callable[..., Tensor], clips: int, tokens: int, channels: int) -> None:
    """Long sequences are split among blocks that wait for each other; many blocks at once meet in the middle."""
    leaves = leaves_of(clips, tokens, channels)
    first = scanned("native", torch.float32, leaves, call)
    for _ in range(20):
        torch.full((2**28,), torch.nan, device="cuda")  # what the next call gets as fresh memory
        again = scanned("native", torch.float32, leaves, call)
        assert not [k for k, v in first.items() if not torch.equal(v, again[k])]


@pytest.mark.parametrize("call", [one, both])
def test_splits_by_the_rule(call: Callable[..., Tensor]) -> None:
    leaves = leaves_of(1, 4000, 192)
    assert_rule([[scanned(*how, leaves, call) for how in
                  (("native", torch.float32), ("torch", torch.float64), ("torch", torch.float32))]])  # fmt: skip


def test_a_launch_plan_has_the_bits_of_a_first_call() -> None:
    torch.manual_seed(0)
    config = fused.VideoMambaConfig(img_size=32, num_frames=2, depth=2, embed_dim=64, num_classes=5)
    model = fused.VideoMamba(config).cuda().train()
    kept = []
    for i in range(6):
        clips = torch.randn(2, 3, 2, 32, 32, device="cuda")
        kept.append(torch.empty(1000 * i + 1, device="cuda"))  # other addresses in every call
        found = []
        for planned in (True, False):
            model.zero_grad()
            with plans.enabled(planned), torch.autocast("cuda", torch.bfloat16):
                logits = model(clips)
            logits.float().square().sum().backward()
            found.append([logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), f"call {i}"


def test_the_clock_of_a_gpu() -> None:
    """By cycles: an H200 has at most two thousand million in a second, and no GPU less than five hundred million."""
    clock = Clock("cuda")
    slept = clock.time(Call(lambda: torch.cuda._sleep(20_000_000)))
    assert 0.009 < slept < 0.05, slept

    def launched_late() -> None:
        time.sleep(0.03)
        torch.cuda._sleep(1_000_000)

    assert clock.time(Call(launched_late)) > 0.03, "the host is timed too"
    assert clock.time(Call(launched_late, queued=True, launch=0.2)) < 0.01, "the launches wait in a queue"


def test_the_peak_on_a_gpu_is_that_of_one_call() -> None:
    def hold(count: int) -> Callable[[], object]:
        return lambda: torch.empty(count, dtype=torch.uint8, device="cuda")

    base = torch.cuda.memory_allocated()
    large, small = (Clock("cuda").peak(Call(hold(count)))[0] - base for count in (2**28, 2**20))
    assert large == 2**28 and small == 2**20
