"""Launch plans against the calls that they repeat, bit for bit: on a GPU, or emulated and interpreted on the CPU."""

import gc
import threading
import weakref

import emulation
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="the kernels of norm and convolution are Triton's")

import fused.ops.mamba_inner.native  # noqa: E402, F401 (it defines the operator)
from fused import VideoMambaConfig, add_norm, causal_conv1d, selective_scan, ssd  # noqa: E402
from fused.models.videomamba.block import Block  # noqa: E402
from fused.runtime import library, plans  # noqa: E402
from fused.runtime.plans import Planned  # noqa: E402
from fused.runtime.recording import NotRecordable, Recorder  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton 3.6's interpreter
DRAWS = 4  # the first call is plain, the second is recorded, the others are plans


@pytest.fixture(autouse=True)
def native(monkeypatch):
    """Backend "native" runs on the CPU, where there is no GPU. No plan is left of another test, and none after this one."""
    if DEVICE == "cpu":
        emulation.stand_in(monkeypatch)
    for planned in library.PLANNED.values():
        planned.plans().clear()
    yield
    for planned in library.PLANNED.values():
        planned.plans().clear()


def with_and_without(run):
    """The results of run(draw) for some draws, without plans and with plans."""
    results = []
    for on in (False, True):
        with plans.enabled(on, DEVICE):
            results.append([run(draw) for draw in range(DRAWS)])
    return results


def randn(generator: torch.Generator, *size: int) -> Tensor:
    return torch.randn(*size, generator=generator).to(DEVICE)


def layer(**options):
    torch.manual_seed(0)
    return Block(VideoMambaConfig(embed_dim=16, depth=1, ssm_cfg={"d_state": 4}, **options), 0, 0.0, "native").to(DEVICE)


def gradients(outputs, leaves, generator):
    grads = torch.autograd.grad(outputs, leaves, [randn(generator, *x.shape).to(x.dtype) for x in outputs])
    return [x.detach() for x in outputs] + list(grads)


def made(name: str) -> list[object]:
    return list(library.PLANNED[getattr(torch.ops.videomamba, name).default].plans().values())


@pytest.mark.parametrize("bimamba", [True, False])
def test_a_layer_and_its_gradients_have_the_same_bits(bimamba):
    block = layer(bimamba=bimamba)

    def trained(draw):
        generator = torch.Generator().manual_seed(draw)
        tokens, residual = (randn(generator, 2, 19, 16).requires_grad_() for _ in range(2))
        hidden, stream, _ = block(tokens, residual, backend="native")
        found = gradients((hidden, stream), (tokens, residual, *block.parameters()), generator)
        with torch.no_grad():
            for p, grad in zip(block.parameters(), found[4:], strict=True):
                p.add_(grad, alpha=1e-3)
        return found

    start = [p.detach().clone() for p in block.parameters()]
    results = []
    for on in (False, True):
        with torch.no_grad():
            for p, value in zip(block.parameters(), start, strict=True):
                p.copy_(value)
        with plans.enabled(on, DEVICE):
            results.append([trained(draw) for draw in range(DRAWS)])
    plain, planned = results
    assert all(torch.equal(a, b) for x, y in zip(plain, planned, strict=True) for a, b in zip(x, y, strict=True))
    assert isinstance(made("mamba_inner")[0], plans.Plan) and isinstance(made("add_norm")[0], plans.Plan)


def operators(generator, cut):
    """The public operators over tokens of 8 channels, of which `cut` makes views: a call and its arguments, by name."""
    x, delta, z, residual = (cut(randn(generator, 3, 13, 24)) for _ in range(4))
    B, C = (randn(generator, *x.shape[:2], 4) for _ in range(2))
    A, D, weight, bias = -randn(generator, 8, 4).abs(), randn(generator, 8), randn(generator, 8, 4), randn(generator, 8)
    conv_state, state = randn(generator, len(x), 8, 3), randn(generator, len(x), 8, 4)
    return {
        "add_norm": (lambda x, w, r: add_norm(x, w, residual=r, backend="native"), (x, D, residual)),
        "causal_conv1d": (
            lambda x, w, b, s: causal_conv1d(x, w, b, initial_state=s, backend="native"),
            (x, weight, bias, conv_state),
        ),
        "selective_scan": (
            lambda u, d, A, B, C, D, z, s: selective_scan(u, d, A, B, C, D, z, initial_state=s, backend="native"),
            (x, delta, A, B, C, D, z, state),
        ),
        "ssd": (
            lambda x, dt, A, B, C: ssd(x.unflatten(2, (2, 4)), dt, A, B[:, :, None], C[:, :, None], backend="native"),
            (x, delta[..., :2], A[:2, 0], B, C),
        ),
    }


VIEWS = {
    "contiguous": lambda x: x[..., :8].contiguous(),
    "strided": lambda x: x[..., 8:16],
    "other clips": lambda x: x[:2, :, 8:16],
    "misaligned": lambda x: x[..., 1:9],
}


@pytest.mark.parametrize("name", ["add_norm", "causal_conv1d", "selective_scan", "ssd"])
def test_other_strides_alignments_and_sizes_are_other_plans(name):
    """The kinds of inputs take turns, so that a plan of one would be met by the next."""

    def run(draw):
        generator, found = torch.Generator().manual_seed(draw), []
        for cut in VIEWS.values():
            call, inputs = operators(generator, cut)[name]
            leaves = [x.detach().requires_grad_() for x in inputs]  # with the strides and the address of the view
            found += gradients(call(*leaves), leaves, generator)
        return found

    plain, planned = with_and_without(run)
    assert all(torch.equal(a, b) for x, y in zip(plain, planned, strict=True) for a, b in zip(x, y, strict=True))
    assert len([x for x in made(name) if isinstance(x, plans.Plan)]) == len(VIEWS), made(name)


def test_strides_alignments_and_values_make_plans_of_their_own():
    planned = Planned(lambda x, factor: (x[1:] * factor,))
    base = torch.arange(20.0, device=DEVICE)
    square = base[:16].view(4, 4)
    kinds = [(square, 2.0), (square.t(), 2.0), (base[1:17].view(4, 4), 2.0), (square, 3.0)]
    with plans.enabled(True, DEVICE):
        for _ in range(3):
            for x, factor in kinds:
                assert torch.equal(planned(x, factor)[0], x[1:] * factor)
    assert [type(x) for x in planned.plans().values()] == [plans.Plan] * len(kinds)


@pytest.mark.usefixtures("nan_filled")
def test_zeros_and_what_is_written_in_place_are_repeated():
    planned = Planned(lambda x: (torch.zeros_like(x).add_(x),))
    with plans.enabled(True, DEVICE):
        for value in range(4):
            x = torch.full((3,), float(value), device=DEVICE)
            assert torch.equal(planned(x)[0], x)
    assert [type(x) for x in planned.plans().values()] == [plans.Plan]


def test_autocast_changes_nothing_inside_a_plan():
    block = layer().eval()

    def run(draw):
        tokens = randn(torch.Generator().manual_seed(draw), 1, 9, 16)
        found = []
        for on in (False, True):
            with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, enabled=on):
                found.append(block(tokens, tokens, backend="native")[0])
                assert torch.is_autocast_enabled(DEVICE) is on
        return found

    plain, planned = with_and_without(run)
    assert [[x.dtype for x in y] for y in planned] == [[torch.float32, torch.bfloat16]] * DRAWS
    assert all(torch.equal(a, b) for x, y in zip(plain, planned, strict=True) for a, b in zip(x, y, strict=True))


def test_operations_of_a_plan_are_repeated_without_autocast_which_stays_on():
    planned, x = Planned(lambda x: (x @ x.t(),)), torch.randn(4, 4, device=DEVICE)
    with plans.enabled(True, DEVICE):
        due = [planned(x)[0] for _ in range(2)][1]
        with torch.autocast(DEVICE, torch.bfloat16):
            got = planned(x)[0]
            assert torch.is_autocast_enabled(DEVICE)
    assert got.dtype == torch.float32 and torch.equal(got, due)


def test_results_of_two_calls_share_no_memory():
    block = layer().eval()
    with torch.no_grad(), plans.enabled(True, DEVICE):
        tokens = [randn(torch.Generator().manual_seed(draw), 1, 9, 16) for draw in range(DRAWS)]
        outs = [block(x, x, backend="native")[0] for x in tokens]
        again = [block(x, x, backend="native")[0] for x in tokens]
    assert all(map(torch.equal, outs, again)) and not any(a.equal(b) for a, b in zip(outs, outs[1:], strict=False))


@pytest.mark.parametrize("wants_gradient", [False, True])
def test_a_result_is_freed_when_it_is_dropped(wants_gradient):
    """Without the garbage collector, as a CUDA graph wants its memory; also while it is recorded, and by the dispatcher."""
    block = layer().requires_grad_(wants_gradient)
    first, second = block.mixer.directions()
    mixer, in_proj, out_proj = torch.ops.videomamba.mamba_inner, block.mixer.in_proj.weight, block.mixer.out_proj.weight
    gc.collect()
    gc.disable()
    try:
        with plans.enabled(True, DEVICE):
            for _ in range(DRAWS):
                x = torch.randn(1, 9, 16, device=DEVICE)
                outs = [*block(x, x, backend="native")[:2]]
                outs += mixer(x, list(first), list(second), in_proj, None, out_proj, None, x.dtype, False, True, False, False)
                if wants_gradient:
                    outs += torch.autograd.grad([outs[0], outs[2]], [in_proj, out_proj], [x, x])
                watched = [weakref.ref(out) for out in outs]
                del outs
                assert not [i for i, watch in enumerate(watched) if watch() is not None]
    finally:
        gc.enable()


def test_threads_have_plans_of_their_own():
    """Triton's interpreter is not made for threads, so that the planned function is of PyTorch operations."""
    planned, outs = Planned(lambda x: torch.cat((x @ x.t(), torch.zeros_like(x)))), {}

    def work(number):
        for turn in range(100):
            x = torch.full((8, 8), float(1000 * number + turn), device=DEVICE)
            outs[number, turn] = planned(x), x
        kinds[number] = [type(plan) for plan in planned.plans().values()]

    kinds = {}
    with plans.enabled(True, DEVICE):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert kinds == {number: [plans.Plan] for number in range(4)} and not planned.plans()
    assert len(outs) == 400 and all(torch.equal(out, torch.cat((x @ x.t(), 0 * x))) for out, x in outs.values())


def test_plans_are_bounded_and_the_last_used_stay(monkeypatch):
    monkeypatch.setattr(plans, "LIMIT", 2)
    sizes: list[int] = []
    planned = Planned(lambda x: sizes.append(len(x)) or x * 2)
    with plans.enabled(True, DEVICE):
        for size in (1, 1, 2, 2, 1, 3):
            planned(torch.ones(size, device=DEVICE))
        assert len(planned.plans()) == 2 and [x.__class__ for x in planned.plans().values()] == [plans.Plan, type(None)]
        planned(torch.ones(1, device=DEVICE))
    assert sizes == [1, 1, 2, 2, 3], "the plan of size 1 has run twice"


def test_inputs_that_share_memory_may_move_apart():
    """A slice of one tensor is an input beside another slice: their distance is part of the plan."""
    planned = Planned(lambda x, y: (torch.cat((x, y)), y.neg()))
    base = torch.arange(64.0, device=DEVICE)
    with plans.enabled(True, DEVICE):
        for start in (16, 16, 16, 32, 48):
            x, y = base[:4], base[start : start + 4]
            joined, negated = planned(x, y)
            assert torch.equal(joined, torch.cat((x, y))) and torch.equal(negated, -y)


def test_what_cannot_be_repeated_runs_as_it_is():
    outside, calls = torch.ones(3, device=DEVICE), []

    def function(x):
        calls.append(x)
        return x + outside

    planned = Planned(function)
    with plans.enabled(True, DEVICE):
        for value in range(4):
            assert torch.equal(planned(outside * value), outside * value + 1)
    assert [type(x) for x in planned.plans().values()] == [str] and len(calls) == 5  # the record is followed by a plain call


@pytest.mark.parametrize("function", [lambda x: (x, x + 1), lambda x: (x * x.sum().item(),)], ids=["input", "number"])
def test_a_result_that_is_an_input_or_depends_on_a_number_has_no_plan(function):
    planned = Planned(function)
    with plans.enabled(True, DEVICE):
        for value in range(4):
            x = torch.full((3,), float(value), device=DEVICE)
            found, due = planned(x), function(x)
            assert all(map(torch.equal, found, due)) and [y is x for y in found] == [y is x for y in due]
    assert [type(x) for x in planned.plans().values()] == [str]


def test_memory_that_no_step_writes_is_no_result_of_a_plan():
    """As of a kernel that is launched past the recorder."""

    def function(x):
        out = torch.empty_like(x)
        with _disable_current_modes():
            out.copy_(x)
        return out

    planned, x = Planned(function), torch.ones(3, device=DEVICE)
    with plans.enabled(True, DEVICE):
        assert all(torch.equal(planned(x * value), x * value) for value in range(4))
    assert "written by nothing" in next(iter(planned.plans().values()))


def test_a_tensor_subclass_is_left_to_the_dispatcher():
    class Wrapped(Tensor):
        pass

    assert Planned(lambda x: x)(torch.ones(2, device=DEVICE).as_subclass(Wrapped)) is NotImplemented


def test_a_recorder_tells_what_it_does_not_know():
    outside = torch.ones(3)
    with Recorder([torch.ones(2)]) as recorder, pytest.raises(NotRecordable, match=r"shape \(3,\) is neither an input nor"):
        recorder.view(outside)
