"""Launch plans against the calls that they repeat, bit for bit: on a GPU, or emulated and interpreted on the CPU."""

import gc
import weakref

import emulation
import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="the kernels of norm and convolution are Triton's")

import fused.ops.mamba_inner.native  # noqa: E402, F401 (it defines the operator)
from fused import VideoMambaConfig, add_norm, causal_conv1d, selective_scan, ssd  # noqa: E402
from fused.backends import batch_invariant  # noqa: E402
from fused.models.videomamba.block import Block  # noqa: E402
from fused.ops.ssd import launch as ssd_launch  # noqa: E402
from fused.runtime import library, plans  # noqa: E402

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


@pytest.mark.parametrize("name", ["causal_conv1d", "selective_scan"])
def test_without_clips_a_state_alone_has_a_gradient(name):
    """Kernels, where there are any, get the gradient of y as zeros without elements."""

    def run(draw):
        generator = torch.Generator().manual_seed(draw)
        call, inputs = operators(generator, lambda x: x[:0, :, :8])[name]
        leaves = [x.detach().requires_grad_() for x in inputs]
        _, state = call(*leaves)
        return [state.detach(), *torch.autograd.grad(state, leaves, torch.zeros_like(state), allow_unused=True)]

    plain, planned = with_and_without(run)
    assert all(torch.equal(a, b) for x, y in zip(plain, planned, strict=True) for a, b in zip(x, y, strict=True))
    if DEVICE == "cpu":  # on a GPU the backward has a thread, and with it plans, of its own
        assert [type(x) for x in made(name + "_backward")] == [plans.Plan]


def test_a_plan_is_of_the_batch_invariant_mode_or_not(monkeypatch):
    """Within the mode a clip's gradients have the bits of it alone, although a plan for these shapes was made outside."""
    monkeypatch.setattr(ssd_launch, "MULTIPROCESSORS", 1)  # the heads of a program depend on few clips already
    generator = torch.Generator().manual_seed(0)
    x, dt, B, C = (randn(generator, 2, 5, *size) for size in ((4, 8), (4,), (1, 4), (1, 4)))
    A, dy = -randn(generator, 4).abs(), randn(generator, 2, 5, 4, 8)

    def of_B(clips):
        leaf = B[:clips].clone().requires_grad_()
        y, _ = ssd(x[:clips], dt[:clips], A, leaf, C[:clips], backend="native")
        return y, leaf

    def gradient(clips):
        y, leaf = of_B(clips)
        return torch.autograd.grad(y, leaf, dy[:clips])[0]

    with plans.enabled(True, DEVICE):
        outside = [gradient(2) for _ in range(2)][1]
        with batch_invariant():
            inside, alone, later = gradient(2), gradient(1), of_B(2)
        later = torch.autograd.grad(*later, dy)[0]  # the backward is of the mode of its forward
    assert not outside.equal(inside) and torch.equal(inside[:1], alone) and torch.equal(later, inside)


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
