"""The mixer as one native operator against the same mixer in PyTorch: on a GPU, or emulated and interpreted on the CPU."""

import copy
import itertools
from functools import partial

import pytest
import torch
from rule import assert_rule
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="the convolution's kernels are Triton's")

import fused.ops.mamba_inner.native  # noqa: E402 (they define the operators)
import fused.ops.mamba_inner.one_direction  # noqa: E402
import fused.ops.mamba_inner.pipeline  # noqa: E402
from fused import add_norm, causal_conv1d  # noqa: E402
from fused.chunked.layer import run_block_two_pass  # noqa: E402
from fused.chunked.layer_ops import scan_chunk  # noqa: E402
from fused.chunked.layer_weights import Direction, LayerSpec  # noqa: E402
from fused.models.videomamba.block import Block  # noqa: E402
from fused.models.videomamba.config import VideoMambaConfig  # noqa: E402
from fused.modules.mamba import Mamba  # noqa: E402
from fused.ops.selective_scan import launch as scan  # noqa: E402
from fused.ops.selective_scan import schedule  # noqa: E402
from fused.ops.shapes import DirectionWeights  # noqa: E402
from fused.runtime import cpu_library  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("native_somewhere"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # Triton 3.6's interpreter
]


def outcome(mixer, tokens, cotangent, backend):
    leaves = [tokens.detach().clone().requires_grad_(), *mixer.parameters()]
    out = mixer(leaves[0], backend=backend)
    grads = torch.autograd.grad(out, leaves, cotangent.to(out.dtype))
    return {"out": out.detach()} | {f"d{i}": g for i, g in enumerate(grads)}


def sample(seed, clips, length, width=8, **options):
    """(native in float32, PyTorch in float64, PyTorch in float32) of one draw."""
    torch.manual_seed(seed)
    mixer = Mamba(width, **{"d_state": 4, **options}).to(DEVICE)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.05 * torch.randn_like(p))
    tokens, cotangent = (torch.randn(clips, length, width).to(DEVICE) for _ in range(2))
    truth = outcome(copy.deepcopy(mixer).double(), tokens.double(), cotangent, "torch")
    return outcome(mixer, tokens, cotangent, "native"), truth, outcome(mixer, tokens, cotangent, "torch")


@pytest.mark.parametrize(
    "options", [{}, {"bimamba": False}, {"bias": True, "conv_bias": False, "d_conv": 3}, {"dt_rank": 3}], ids=str
)
def test_follows_the_mixer_in_pytorch(options):
    assert_rule(sample(seed, 2, 19, **options) for seed in range(4))


def test_time_is_cut(monkeypatch):
    # with the least number of tiles in use, the interpreter would walk 16 tiles for half a minute
    monkeypatch.setattr(schedule, "MIN_TILES_PER_SPLIT", 2)
    monkeypatch.setattr(schedule, "make_schedule", partial(schedule.make_schedule.__wrapped__, num_splits=2))
    assert schedule.make_schedule(1, 65, 16, 4, 2, 1).fwd_schedule.num_splits == 2
    # of 8 channels, and few draws, the largest error is that of a single unlucky one
    assert_rule(sample(seed, 1, 65, width=32) for seed in range(4))


@pytest.mark.parametrize("pieces", [0, 2])
@pytest.mark.parametrize("options", [{"d_state": 4}, {"d_state": 4, "bimamba": False}, {"d_model": 32}], ids=str)
def test_what_is_kept_changes_no_bit_and_spares_a_scan(monkeypatch, pieces, options):
    """Also in the kernels of whole blocks of channels and 16 states, which on a GPU run in bfloat16."""
    options = {"d_model": 8, **options}
    width = options["d_model"]
    dtype = torch.bfloat16 if DEVICE == "cuda" and width == 32 else torch.float32
    monkeypatch.setattr(schedule, "MIN_TILES_PER_SPLIT", 1)
    monkeypatch.setattr(schedule, "make_schedule", partial(schedule.make_schedule.__wrapped__, num_splits=pieces))
    torch.manual_seed(0)
    mixer, tokens, cotangent = Mamba(**options).to(DEVICE, dtype), *torch.randn(2, 1, 35, width).to(DEVICE, dtype)
    scans, forward = [], scan.forward
    monkeypatch.setattr(scan, "forward", lambda *a, **k: scans.append(k["keep"]) or forward(*a, **k))
    lean = outcome(mixer, tokens, cotangent, "native")
    assert scans == [False, True]
    kept = outcome(mixer, tokens, cotangent, "native_kept")
    assert scans[2:] == [True] and all(torch.equal(kept[name], x) for name, x in lean.items())
    with torch.no_grad():
        mixer(tokens, backend="native_kept")
    assert scans[3:] == [False]  # there will be no backward


@pytest.mark.parametrize("backend", ["native", "native_kept"])
def test_checkpointed_gradients_are_the_same(backend):
    torch.manual_seed(0)
    mixer, tokens, cotangent = Mamba(8, d_state=4).to(DEVICE), *torch.randn(2, 1, 19, 8).to(DEVICE)
    plain = outcome(mixer, tokens, cotangent, backend)

    def again(x, backend):
        return checkpoint(mixer, x, use_reentrant=False, backend=backend)

    again.parameters = mixer.parameters
    assert all(torch.equal(x, plain[name]) for name, x in outcome(again, tokens, cotangent, backend).items())


def test_a_state_goes_through_the_operators_of_the_mixer():
    torch.manual_seed(0)
    mixer, tokens = Mamba(8, d_state=4, bimamba=False).to(DEVICE), torch.randn(2, 19, 8).to(DEVICE)
    whole = mixer(tokens, backend="native")
    first, state = mixer(tokens[:, :7], return_state=True, backend="native")
    rest, _ = mixer(tokens[:, 7:], state=state, return_state=True, backend="native")
    torch.testing.assert_close(torch.cat((first, rest), 1), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clips, length", [(2, 0), (0, 3), (0, 0)])
@pytest.mark.parametrize("backend", ["native", "native_kept", "cpu", "torch"])
def test_without_tokens_or_clips_gradients_are_zero_and_the_state_stays(backend, clips, length):
    if backend == "cpu" and (reason := cpu_library.unavailable()):
        pytest.skip(reason)
    device = "cpu" if backend == "cpu" else DEVICE
    nothing = torch.empty(clips, length, 8, device=device)
    for mixer in (Mamba(8, d_state=4).to(device), Mamba(8, d_state=4, bimamba=False).to(device)):
        found = outcome(mixer, nothing, nothing, backend)
        assert found["out"].shape == nothing.shape
        assert all(torch.equal(found[f"d{i}"], torch.zeros_like(x)) for i, x in enumerate((nothing, *mixer.parameters())))

    sizes = [(clips, 16, 3), (clips, 16, 4)]
    state, cotangents = ([torch.randn(size, device=device) for size in sizes] for _ in range(2))
    leaves = [nothing.requires_grad_(), *(x.requires_grad_() for x in state), *mixer.parameters()]
    if clips:  # a state has at least one
        out, after = mixer(nothing, state=tuple(state), return_state=True, backend=backend)
        grads = torch.autograd.grad((out, *after), leaves, (out.detach(), *cotangents))
        assert all(map(torch.equal, after, state)) and all(map(torch.equal, grads[1:3], cotangents))
        assert not any(g.any() for g in grads[3:])


@pytest.mark.parametrize(
    ("options", "words"), [({"d_state": 65}, "d_state up to 64, got 65"), ({"d_conv": 9}, "d_conv up to 8")]
)
def test_what_native_has_not_is_named(options, words):
    for arguments in ({}, {"return_state": True}):
        with pytest.raises(ValueError, match=words):
            Mamba(8, bimamba=False, **options).to(DEVICE)(torch.randn(1, 3, 8).to(DEVICE), backend="native", **arguments)


def walked(seed, dtype, backend, length, reverse, given):
    """One direction from state to state by name, with the gradient of every input: `given` of z, beside and a state."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size, scale=1.0):
        return (scale * torch.randn(*size, generator=g)).to(DEVICE, dtype).requires_grad_()

    B, E, N, R, K = 2, 8, 4, 3, 4
    leaves = {
        "x": normal(B, length, E), "conv": normal(E, K, scale=0.5), "conv_bias": normal(E),
        "x_proj": normal(R + 2 * N, E, scale=0.3), "dt_proj": normal(E, R, scale=0.5), "dt_bias": normal(E),
        "A": (-torch.rand(E, N, generator=g) * N - 0.1).to(DEVICE, dtype).requires_grad_(), "D": normal(E),
    }  # fmt: skip
    leaves |= {name: normal(B, length, E) for name in ("z", "beside")}
    taps, state = normal(B, E, K - 1), normal(B, E, N)
    cotangents = [normal(*size).detach() for size in ((B, length, E), (B, E, K - 1), (B, E, N))]
    leaves = {name: x for name, x in leaves.items() if name not in ("z", "beside") or name in given}
    if "state" in given:
        leaves |= {"taps": taps, "state": state}
    own = Direction(DirectionWeights(*(leaves[name] for name in DirectionWeights._fields)))
    spec = LayerSpec((), backend, False, "rms", 1e-5, True, dtype, dtype, dtype, dtype)
    entering = (taps, state) if "state" in given else ()
    y, left = scan_chunk(spec, own, leaves["x"], entering, reverse, leaves.get("z"), leaves.get("beside"))
    outputs = {"y": y, "taps left": left[0], "state left": left[1]}
    grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), cotangents)
    return {k: v.detach() for k, v in outputs.items()} | {f"d{k}": g for k, g in zip(leaves, grads, strict=True)}


@pytest.mark.parametrize(
    ("length", "reverse", "given"),
    [(17, False, ("z", "beside", "state")), (17, True, ("state",)), (17, True, ("z",)), (1, False, ("z", "state"))],
    ids=str,
)
def test_a_chunk_follows_its_operators(length, reverse, given):
    assert_rule(
        (
            walked(seed, torch.float32, "native", length, reverse, given),
            walked(seed, torch.float64, "torch", length, reverse, given),
            walked(seed, torch.float32, "torch", length, reverse, given),
        )
        for seed in range(4)
    )


@pytest.mark.parametrize("backend", ["native", "native_kept"])
def test_a_backward_within_autocast_is_what_it_is_without(backend):
    mixer, tokens = Mamba(8, d_state=4).to(DEVICE), torch.randn(2, 19, 8).to(DEVICE)
    due = torch.autograd.grad(mixer(tokens, backend=backend).sum(), list(mixer.parameters()))
    y = mixer(tokens, backend=backend).sum()
    with torch.autocast(DEVICE, torch.bfloat16):
        got = torch.autograd.grad(y, list(mixer.parameters()))
    own = [name for name, _ in mixer.named_parameters()]
    assert all(torch.equal(a, b) for a, b, name in zip(due, got, own, strict=True) if "in_proj" not in name)  # PyTorch's own


def test_a_chunk_is_an_operator_as_torch_wants_it():
    def leaf(*size):
        return torch.randn(*size, device=DEVICE).requires_grad_()

    parameters = (leaf(8, 4), leaf(8), leaf(11, 8), leaf(8, 3), leaf(8), leaf(8, 4), leaf(8))
    streams = (leaf(1, 5, 8), leaf(1, 5, 8), leaf(1, 5, 8), leaf(1, 8, 3), leaf(1, 8, 4))
    operator = torch.ops.videomamba.mamba_inner_one_direction.default
    packed = fused.ops.mamba_inner.one_direction.pack_matrices(DirectionWeights(*(x.detach() for x in parameters)))
    for once in ([], list(packed)):
        torch.library.opcheck(operator, (*streams, list(parameters), once, False, True, False, True))


def test_a_mixer_is_an_operator_as_torch_wants_it():
    layer = Mamba(8, d_state=4, backend="native").to(DEVICE)
    first, second = ([x.detach().requires_grad_() for x in weights] for weights in layer.directions())
    operator, in_proj, out_proj = torch.ops.videomamba.mamba_inner.default, layer.in_proj.weight, layer.out_proj.weight
    for weight, width in ((in_proj, 8), (None, 32)):
        u = torch.randn(1, 5, width, device=DEVICE).requires_grad_()
        for keep in (False, True):
            options = u.dtype, False, not keep, keep, False
            torch.library.opcheck(operator, (u, first, second, weight, None, out_proj, None, *options))


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_a_compiled_mixer_takes_another_batch(training):
    """The schedule depends on the batch, and the number of splits on the schedule: neither may make a constant of the batch."""
    layer = Mamba(8, d_state=4, backend="native").to(DEVICE)
    weights = [[x.detach().requires_grad_() for x in direction] for direction in layer.directions()]
    leaves = [layer.in_proj.weight, layer.out_proj.weight, *weights[0], *weights[1]]

    def mixer(u):
        linear = layer.in_proj.weight, None, layer.out_proj.weight, None
        return torch.ops.videomamba.mamba_inner(u, *weights, *linear, torch.float32, False, False, False, not training)[0]

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(mixer, fullgraph=True, backend=counter)
    for clips in (2, 3, 5):
        u, cotangent = torch.randn(clips, 9, 8, device=DEVICE).requires_grad_(training), torch.randn(clips, 9, 8, device=DEVICE)
        torch._dynamo.mark_dynamic(u, 0)
        with torch.set_grad_enabled(training):
            outs = [run(u) for run in (compiled, mixer)]
        results = [[out, *(torch.autograd.grad(out, [u, *leaves], cotangent) if training else ())] for out in outs]
        assert all(map(torch.equal, *results)) and counter.frame_count == 1


def test_one_token_of_one_clip():
    assert_rule(sample(seed, 1, 1) for seed in range(16))


def layer_in_chunks(seed, clips, sizes, backend, dtype, trained):
    """Outputs of a layer over chunks of so many tokens, and of one that is `trained` its gradients."""
    torch.manual_seed(seed)
    layer = Block(VideoMambaConfig(embed_dim=32, depth=1, ssm_cfg={"d_state": 4}), 0, 0.0).to(DEVICE)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.05 * torch.randn_like(p))
            p.data = p.data.to(dtype)
        for own in ("D", "D_b"):  # as a model in half precision has it
            setattr(layer.mixer, own, torch.nn.Parameter(getattr(layer.mixer, own).half()))
    hidden, residual, *cotangents = (torch.randn(clips, sum(sizes), 32).to(DEVICE, dtype) for _ in range(4))
    chunks = [slice(*pair) for pair in itertools.pairwise([0, *itertools.accumulate(sizes)])]
    with torch.set_grad_enabled(trained):
        leaves = [hidden.requires_grad_(trained), residual.requires_grad_(trained)]
        outs = dict(zip(("hidden", "residual"), run_block_two_pass(layer, *leaves, chunks, backend), strict=True))
    weights = [p for p in layer.parameters() if p.dtype == dtype]
    grads = torch.autograd.grad(list(outs.values()), [*leaves, *weights], cotangents) if trained else ()
    return {k: v.detach() for k, v in outs.items()} | {f"d{i}": g for i, g in enumerate(grads)}


@pytest.mark.parametrize(("clips", "whole", "trained"), [(1, 0, True), (2, 1, False)], ids=["all chains cut", "one of two cut"])
def test_a_layer_walks_its_chunks_by_states_where_time_is_cut(clips, whole, trained, monkeypatch):
    def cut(*args, **options):
        found = honest(*args, **options, num_splits=2)
        return found._replace(fwd_schedule=found.fwd_schedule._replace(num_unsplit=whole))

    asked, packed, states, honest = [], [], scan.state_pass, schedule.make_schedule.__wrapped__
    pipeline = fused.ops.mamba_inner.pipeline
    pack = pipeline.pack_weights
    monkeypatch.setattr(schedule, "MIN_TILES_PER_SPLIT", 1)
    monkeypatch.setattr(schedule, "make_schedule", cut)
    monkeypatch.setattr(scan, "state_pass", lambda *a: asked.append(a) or states(*a))
    monkeypatch.setattr(pipeline, "pack_weights", lambda *a: packed.append(a) or pack(*a))
    kinds = ("native", torch.float32), ("torch", torch.float64), ("torch", torch.float32)
    assert_rule([layer_in_chunks(seed, clips, (33, 19, 20), *kind, trained) for kind in kinds] for seed in range(2))
    assert len(asked) == 2 * 2 * 2  # seeds, chunks but the first, directions
    assert len(packed) == 2 * (3 if trained else 1)  # once a layer, and for its gradients once a direction


@pytest.mark.parametrize("operator", ["mixer", "one direction", "convolution", "norm"])
def test_a_gradient_is_not_differentiated_silently(operator):
    """As the scan's, also where the cotangent is constant; autograd's own check would miss that."""
    x = torch.randn(1, 5, 8, device=DEVICE, requires_grad=True)
    if operator == "convolution":
        y = causal_conv1d(x, torch.randn(8, 4, device=DEVICE, requires_grad=True), backend="native")[0]
    elif operator == "norm":
        y = add_norm(x, torch.ones(8, device=DEVICE, requires_grad=True), prenorm=False, backend="native")
    else:
        mixer = Mamba(8, d_state=4, bimamba=operator == "mixer").to(DEVICE)
        y = mixer(x, backend="native") if operator == "mixer" else mixer(x, return_state=True, backend="native")[0]
    for loss in (y.sum(), y.square().sum()):
        (dx,) = torch.autograd.grad(loss, x, create_graph=True, retain_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            dx.sum().backward(retain_graph=True)
