"""The scan and the mixer at query rows against those of every row: on a GPU, or emulated and interpreted on the CPU."""

import itertools
from functools import partial

import compilers
import pytest
import torch
from rule import assert_rule

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="the convolution's kernels are Triton's")

from fused import BimbaCompressor, backends  # noqa: E402
from fused.models.bimba.interleave import places_of  # noqa: E402
from fused.models.bimba.query_mixer import mix_at_queries  # noqa: E402
from fused.modules.mamba import Mamba  # noqa: E402
from fused.ops.mamba_inner import query_rows  # noqa: E402
from fused.ops.selective_scan import kernel_source, schedule  # noqa: E402
from fused.ops.selective_scan import launch as scan  # noqa: E402
from fused.ops.selective_scan.query_rows import tile_queries  # noqa: E402
from fused.runtime import nvrtc  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("native_somewhere"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # Triton 3.6's interpreter
]


def test_the_table_of_tiles():
    table = tile_queries(torch.tensor([0, 15, 16, 33]), 50)
    assert table.dtype == torch.int32 and table.tolist() == [[0, 1 | 1 << 15], [2, 1], [3, 2], [4, 0]]
    assert tile_queries(torch.arange(17), 17).tolist() == [[0, 0xFFFF], [16, 1]]


def scanned(s, plan, dy):
    """All results of a scan's forward, of that which keeps states, and of its backward, in the order of tokens."""
    lean, kept = (scan.forward(s, None, plan, keep=keep) for keep in (False, True))
    dB, dC = ([torch.empty_like(x) for x in pair] for pair in (s.B, s.C))
    pre_gate = None if s.z is None else kept.y_pre_gate
    grads = scan.backward(s, dy, None, kept.tile_states, pre_gate, plan, dB, dC)
    by_query = [lean.y, kept.y, kept.y_pre_gate] + ([] if s.z is None else [grads.z])
    pairs = (grads.u, grads.delta, grads.A, grads.D, grads.delta_bias, dB, dC)
    return by_query, [lean.final_states, kept.tile_states, grads.initial_states, *itertools.chain(*pairs)]


@pytest.mark.parametrize(
    ("length", "places", "E", "N", "dtype", "directions", "gate", "splits"),
    [
        (40, [8, 17, 26, 35], 8, 16, torch.float32, 2, True, 0),
        (40, [0, 3, 8, 17, 26, *range(35, 40)], 64, 16, torch.bfloat16, 2, True, 0),
        (33, [5, 32], 6, 4, torch.float32, 2, True, 0),
        (33, [16], 6, 20, torch.float32, 2, True, 0),
        (33, [5, 32], 6, 4, torch.float16, 1, False, 0),
        (17, list(range(17)), 64, 16, torch.float32, 1, True, 0),
        (300, list(range(3, 300, 5)), 16, 16, torch.float32, 2, True, 2),
    ],
    ids=lambda x: "" if isinstance(x, list) else str(x).removeprefix("torch."),
)
def test_query_rows_have_the_bits_of_the_scan_of_every_row(length, places, E, N, dtype, directions, gate, splits):
    g = torch.Generator().manual_seed(0)

    def normal(*size, to=torch.float32):
        return torch.randn(*size, generator=g).to(DEVICE, to)

    def pair(*size, to=torch.float32):
        return [normal(*size, to=to) for _ in range(directions)]

    at, B = torch.tensor(places, device=DEVICE), 2
    u, delta = pair(B, length, E, to=dtype), pair(B, length, E, to=dtype)
    A, mixing = [-a.exp() for a in pair(E, N)], [pair(B, length, N, to=dtype) for _ in range(2)]
    z, dy = (normal(B, length, E, to=dtype) for _ in range(2))
    every = scan.ScanInputs((False, True)[:directions], u, delta, A, *mixing, pair(E), pair(E), z if gate else None)
    queries = every._replace(tile_queries=tile_queries(at, length), num_queries=len(at), z=z[:, at] if gate else None)
    plan = schedule.make_schedule.__wrapped__(B, length, E, N, directions, 2, num_splits=splits)
    assert (plan.fwd_schedule.num_splits > 1) == bool(splits)
    at_rows = torch.zeros_like(dy).index_copy(1, at, dy[:, at])  # no gradient arrives elsewhere
    by_query, due = scanned(every, plan, at_rows)
    got_by_query, got = scanned(queries, plan, dy[:, at])
    assert all(torch.equal(x, y[:, at]) for x, y in zip(got_by_query, by_query, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(got, due, strict=True))


@pytest.mark.parametrize("order", ["reverse", "random:1"])
def test_order_of_threads_changes_nothing(order, monkeypatch):
    outs = [mixed(0, 13, 4, "native", torch.float32)]
    monkeypatch.setenv("EMULATION_ORDER", order)
    outs.append(mixed(0, 13, 4, "native", torch.float32))
    assert all(torch.equal(x, outs[1][name]) for name, x in outs[0].items())


def mixed(seed, num_tokens, num_queries, backend, dtype, width=8, **options):
    """The output and all gradients of a mixer at query rows; with backend "every row", of the whole mixer on "torch"."""
    torch.manual_seed(seed)
    mixer = Mamba(width, **{"d_state": 4, **options})
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.05 * torch.randn_like(p))
    places = places_of(num_tokens, num_queries, torch.device(DEVICE))
    sequence, cotangent = torch.randn(2, num_tokens + num_queries, width), torch.randn(2, num_queries, width)
    mixer, cotangent = mixer.to(DEVICE, dtype), cotangent.to(DEVICE, dtype)
    sequence = sequence.to(DEVICE, dtype).requires_grad_()
    if backend == "every row":
        out = mixer(sequence, backend="torch")[:, places.queries]
    else:
        out = mix_at_queries(mixer, sequence, sequence[:, places.queries], places, backend)
    leaves = [sequence, *mixer.parameters()]
    grads = torch.autograd.grad(out, leaves, cotangent)
    return {"out": out.detach()} | {f"d{i}": g for i, g in enumerate(grads)}


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize(
    ("sizes", "options"),
    [((24, 3), {}), ((29, 22), {"bimamba": False}), ((3, 7), {"bias": True}), ((1, 1), {}), ((33, 1), {"width": 32})],
    ids=str,
)
def test_follows_the_whole_mixer(sizes, options, backend):
    if options.get("bias") and backend == "torch":
        options = {}
    kinds = (backend, torch.float32), ("every row", torch.float64), ("every row", torch.float32)
    assert_rule([mixed(seed, *sizes, *kind, **options) for kind in kinds] for seed in range(4))


def test_time_is_cut(monkeypatch):
    monkeypatch.setattr(schedule, "MIN_TILES_PER_SPLIT", 1)
    monkeypatch.setattr(schedule, "make_schedule", partial(schedule.make_schedule.__wrapped__, num_splits=2))
    kinds = ("native", torch.float32), ("every row", torch.float64), ("every row", torch.float32)
    assert_rule([mixed(seed, 30, 5, *kind, width=32) for kind in kinds] for seed in range(4))


def test_it_is_an_operator_as_torch_wants_it():
    layer, places = Mamba(8, d_state=4).to(DEVICE), places_of(5, 2, torch.device(DEVICE))
    first, second = ([x.detach().requires_grad_() for x in weights] for weights in layer.directions())
    u, queries = (torch.randn(1, n, 8, device=DEVICE).requires_grad_() for n in (7, 2))
    weights = first, second, layer.in_proj.weight, None, layer.out_proj.weight, None
    operator = torch.ops.videomamba.mamba_inner_query_rows.default
    torch.library.opcheck(operator, (u, queries, *weights, places.tile_queries, torch.float32, False, True))
    with torch.no_grad():
        kept = operator(u, queries, *weights, places.tile_queries, torch.float32, False, False)[1:]
    assert not any(x.numel() for x in kept)  # without a gradient nothing is kept


def compressed(seed, n_layer, backend, dtype, grad=True):
    torch.manual_seed(seed)
    compressor = BimbaCompressor(8, n_layer, 4, backend=backend, initial_values="corrected").to(DEVICE, dtype)
    tokens, queries, cotangent = torch.randn(1, 2, 2, 3, 8), torch.randn(1, 2, 2, 8), torch.randn(1, 2, 2, 8)
    leaves = [x.to(DEVICE, dtype).requires_grad_(grad) for x in (tokens, queries)]
    out = compressor(*leaves)
    grads = torch.autograd.grad(out, [*leaves, *compressor.parameters()], cotangent.to(out), allow_unused=True)
    return {"out": out.detach()} | {f"d{i}": torch.zeros(1) if g is None else g for i, g in enumerate(grads)}


@pytest.mark.parametrize("n_layer", [1, 2])
def test_a_compressor_follows_pytorch(n_layer):
    kinds = ("native", torch.float32), ("torch", torch.float64), ("torch", torch.float32)
    assert_rule([compressed(seed, n_layer, *kind) for kind in kinds] for seed in range(4 // n_layer))


@pytest.mark.parametrize("trained", [False, True])
def test_chunks_follow_pytorch(trained):
    """Without gradients each direction is scanned at query rows, of which a chunk may have none."""

    def run(seed, backend, dtype):
        torch.manual_seed(seed)
        compressor = BimbaCompressor(8, 1, 4, backend=backend).to(DEVICE, dtype)
        tokens, queries, cotangent = torch.randn(1, 4, 2, 3, 8), torch.randn(1, 1, 2, 8), torch.randn(1, 1, 2, 8)
        leaves = [x.to(DEVICE, dtype).requires_grad_(trained) for x in (tokens, queries)]
        with torch.set_grad_enabled(trained):
            out = compressor.forward_chunked(*leaves, chunk_frames=1)
        grads = torch.autograd.grad(out, [*leaves, *compressor.parameters()], cotangent.to(out)) if trained else ()
        return {"out": out.detach()} | {f"d{i}": g for i, g in enumerate(grads)}

    kinds = ("native", torch.float32), ("torch", torch.float64), ("torch", torch.float32)
    assert_rule([run(seed, *kind) for kind in kinds] for seed in range(2 if trained else 4))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_tuned_kernels_do_not_spill(arch):
    if reason := nvrtc.compiler_unavailable():
        pytest.skip(reason)
    plan, over = schedule.make_schedule(1, 16, 64, 16, 2, 1), []
    for keep in (False, True):
        macros = kernel_source.defines(
            io_dtype=torch.bfloat16, schedule=plan, directions=2, vectorized=True, vectorized_bc=True, no_padding=True,
            softplus=kernel_source.SOFTPLUS_BY_CALLER, has_z=True, store_tile_states=keep, query_rows=True,
        )  # fmt: skip
        for program in ("forward", "backward")[: 1 + keep]:
            for name, r in nvrtc.resources(kernel_source.source(program), macros, arch).items():
                assert r.registers <= 168
                if r.spills > (160 if name == "scan_backward" else 0):
                    over.append(f"{name} on {arch}: {r.spills} bytes spilt")
    compilers.fail_or_warn("NVRTC", over)


def test_inference_in_blocks_of_channels_changes_no_bit(monkeypatch):
    torch.manual_seed(0)
    mixer, places = Mamba(128, d_state=4).to(DEVICE), places_of(40, 7, torch.device(DEVICE))
    tokens = torch.randn(2, 47, 128, device=DEVICE)
    run = lambda: mix_at_queries(mixer, tokens, tokens[:, places.queries], places, "native")  # noqa: E731
    widths, forward = [], scan.forward
    spied = lambda s, *rest, **options: widths.append(s.u[0].shape[2]) or forward(s, *rest, **options)  # noqa: E731
    monkeypatch.setattr(scan, "forward", spied)
    with torch.no_grad():
        whole = run()
        monkeypatch.setattr(query_rows, "BLOCK_ELEMENTS", 1)
        in_blocks = run()
        with backends.batch_invariant():
            monkeypatch.setattr(query_rows, "BLOCK_ELEMENTS", 2 * 47 * 256)  # of one clip
            assert torch.equal(run(), whole)
    assert widths == [256, 64, 64, 64, 64, 256] and torch.equal(in_blocks, whole)
