"""The emulation itself: right numbers, and mistakes that a GPU would hide raise or change the result."""

import emulation
import pytest
import torch

pytestmark = pytest.mark.skipif(emulation.unavailable() is not None, reason=str(emulation.unavailable()))
THREADS = (("THREADS", 128),)
ONE = (1, 1, 1)


def run(bodies, body, x, *, shared=0, order=None):
    """Run one block with `body` on x (float32) and s in shared memory and return x. All `bodies` are compiled as one kernel."""
    cases = "\n".join(f"case {i}: {{\n#line 2\n{text}\n}} break;" for i, text in enumerate(bodies))
    source = f'extern "C" __global__ void k(float* x, long long which) {{ SHARED(s) switch (which) {{\n{cases}\n}}}}'
    emulation.module(source).launch("k", ONE, 64, shared, x, bodies.index(body), order=order)
    return x


@pytest.mark.parametrize("fibers", [(), (("EMULATION_UCONTEXT", 1),)], ids=["own", "ucontext"])
@pytest.mark.parametrize("order", [*emulation.ORDERS, "random:5"])
def test_example(order, fibers, monkeypatch):
    """A sum over a block: shuffles, shared memory, a barrier, bfloat16 in and out, in every order of threads."""
    monkeypatch.setenv("EMULATION_ORDER", order)
    x = torch.randn(5, 1001, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = torch.full((5,), torch.nan, dtype=torch.bfloat16)
    emulation.module(emulation.EXAMPLE, THREADS + fibers, x.device).launch("row_sum", (5, 1, 1), 128, 16, x, y, 1001)
    assert torch.allclose(y.double(), x.double().sum(1), rtol=2**-8, atol=0)


def test_missing_barrier_shows():
    """Warp 0 reads what the others have not written yet: NaN if it runs first, the sum if it runs last."""
    source = emulation.EXAMPLE.replace("__syncthreads();", "")
    assert source != emulation.EXAMPLE
    x, results = torch.ones(1, 1024).bfloat16(), []
    for order in emulation.ORDERS:
        y = torch.empty(1, dtype=torch.bfloat16)
        emulation.module(source, THREADS).launch("row_sum", ONE, 128, 16, x, y, 1024, order=order)
        results.append(y.item())
    assert results[0] != results[0] and results[1] == 1024


MISTAKES = [
    ("s[threadIdx.x] = 1;", 48, "shared memory: written at byte 48 of 48"),
    ("s[threadIdx.x] = 1;", 0, "shared memory: access at byte 0 of 0.* in line 2"),
    ("if (threadIdx.x == 3) s[-4] = 1;", 256, "shared memory: written at byte -4 of 256"),
    ("x[0] = s[70000];", 256, "shared memory: access at byte 70000 of 256.* in line 2"),
    ("float v[4]; x[threadIdx.x] = v[threadIdx.x];", 0, "thread 4: .*an index beyond a local array in line 2"),
    ("x[0] = reinterpret_cast<float4*>(x + 1)->x;", 0, "a misaligned access.* in line 2"),
    ("copy_async<16>(s, x + 1);", 256, "copy_async<16>: misaligned"),
    ("x = nullptr; x[0] = 1;", 0, "memory that is not there, at address .nil.* in line 2"),
    ("if (threadIdx.x < 16) __syncthreads();", 0, "deadlock: 16 of 64 .* __syncthreads.* in line 2, .* 48 have returned"),
    ("if (threadIdx.x < 16)\n__syncthreads();\nelse\n__syncthreads();", 0, "divergent barrier: .* line [35]"),
    ("if (threadIdx.x < 16) x[0] = __shfl_xor_sync(~0u, x[1], 1);", 0, "deadlock: 16 of 64 threads wait at a shuffle"),
    ("if (threadIdx.x < 16) x[0] = __shfl_xor_sync(0xffff, x[1], 16);", 0, "reads lane 16, which takes no part"),
    ("x[0] = __shfl_xor_sync(0xffff, x[1], 1);", 0, "not in its own mask"),
    ("if (threadIdx.x & 1)\n__syncwarp();\nelse x[0] = __shfl_xor_sync(~0u, x[1], 1);", 0, "divergent warp"),
    ("__trap();", 0, "__trap"),
]


@pytest.mark.parametrize("body, shared, words", MISTAKES)
def test_mistakes_raise(body, shared, words):
    with pytest.raises(emulation.EmulationError, match=words):
        run([body for body, _, _ in MISTAKES], body, torch.zeros(64), shared=shared, order="forward")


def test_launches_that_no_gpu_accepts_raise():
    kernel = emulation.module('extern "C" __global__ void __launch_bounds__(2 * 32, 2) k(float* x) {}')
    for grid, threads, shared, words in [
        ((0, 1, 1), 64, 0, "grid"),
        ((1, 65536, 1), 64, 0, "grid"),
        (ONE, 65, 0, "1 to 64"),
        (ONE, 0, 0, "1 to 64"),
        (ONE, 64, 240000, "shared memory"),
    ]:
        with pytest.raises(emulation.EmulationError, match=words):
            kernel.launch("k", grid, threads, shared, torch.zeros(1))
    with pytest.raises(emulation.EmulationError, match="no kernel 'j'"):
        kernel.launch("j", ONE, 64, 0, torch.zeros(1))


def test_arguments():
    """Null pointers, 64-bit integers and float32 arrive; a wrong kind or number is a TypeError."""
    source = 'extern "C" __global__ void k(double* y, const float* none, long long n, float f) { y[0] = none ? 0 : n + f; }'
    kernel, y = emulation.module(source), torch.zeros(1, dtype=torch.float64)
    kernel.launch("k", ONE, 1, 0, y, None, 2**40, 0.5)
    assert y.item() == float(torch.tensor(2**40, dtype=torch.float32) + 0.5)  # long long + float is float
    for args in [(y, None, 1), (y, None, 1.0, 1.0), (y, None, 1, 1), (y, 0, 1, 1.0), (1.0, None, 1, 1.0)]:
        with pytest.raises(TypeError):
            kernel.launch("k", ONE, 1, 0, *args)
    with pytest.raises(emulation.EmulationError, match="pointers, long long and float only"):
        emulation.module('extern "C" __global__ void k(float* x, int n) {}')
    with pytest.raises(emulation.EmulationError, match="no kernel in the source"):
        emulation.module("__global__ void k(float* x) {}")
    with pytest.raises(emulation.EmulationError, match="(?s)does not compile.*nonsense"):
        emulation.module('extern "C" __global__ void k(float* x) { nonsense(x); }')
    with pytest.raises(ValueError, match="sideways"):
        kernel.launch("k", ONE, 1, 0, y, None, 1, 1.0, order="sideways")


def test_uninitialized_memory_shows():
    """Shared memory is NaN at first in every block, in all three dtypes; an uninitialized variable has an absurd value."""
    dynamic = "float* f = (float*)s; x[threadIdx.x] = f[threadIdx.x] + from_bf16(*(short*)s) + from_fp16(*(short*)s);"
    static = "__shared__ float f[64]; x[threadIdx.x] = f[threadIdx.x]; f[threadIdx.x] = 1;"
    unset = "float f[4]; x[threadIdx.x] = f[(int)x[0] & 3];"
    bodies = [dynamic, static, unset]
    for body in (dynamic, static, static):
        assert run(bodies, body, torch.zeros(64), shared=256).isnan().all()
    if emulation.INIT_LOCALS in emulation.compiler_flags():
        assert (run(bodies, unset, torch.zeros(64)).abs() > 1e38).all()


def test_fences():
    """An access beyond the fenced end of a tensor raises; its values are those of the tensor, whatever its size."""
    x = torch.arange(35, dtype=torch.int16).view(5, 7).bfloat16()
    within, beyond, before = bodies = [
        "x[threadIdx.x] += 1;", "x[threadIdx.x] = x[threadIdx.x + 1];", "x[threadIdx.x] = x[(int)threadIdx.x - 1];"
    ]  # fmt: skip
    for at_end, outside, thread in ((True, beyond, 63), (False, before, 0)):
        assert torch.equal(emulation.fenced(x, at_end), x)
        assert torch.equal(run(bodies, within, emulation.fenced(torch.zeros(64), at_end)), torch.ones(64))
        with pytest.raises(emulation.EmulationError, match=f"thread {thread}: access to memory that is not there"):
            run(bodies, outside, emulation.fenced(torch.zeros(64), at_end))


@pytest.mark.parametrize("order", emulation.ORDERS)
def test_barriers_shuffles_and_copies(order):
    """Exchange within a warp and a block, against PyTorch."""
    lane = torch.arange(64) % 32
    swap = "float* f = (float*)s; {} x[threadIdx.x] = f[63 - threadIdx.x];"
    values = torch.arange(64.0)
    cases = {
        "x[threadIdx.x] = __shfl_xor_sync(~0u, x[threadIdx.x], 5);": values.view(2, 32)[:, torch.arange(32) ^ 5].flatten(),
        "x[threadIdx.x] = __shfl_xor_sync(~0u, threadIdx.x, 5);": values.view(2, 32)[:, torch.arange(32) ^ 5].flatten(),
        "x[threadIdx.x] = __shfl_sync(~0u, x[threadIdx.x], 3, 8);": values // 8 * 8 + 3,
        "x[threadIdx.x] = __shfl_up_sync(~0u, x[threadIdx.x], 2);": torch.where(lane < 2, values, values - 2),
        "x[threadIdx.x] = __shfl_down_sync(~0u, x[threadIdx.x], 2, 16);": torch.where(lane % 16 > 13, values, values + 2),
        "x[threadIdx.x] = __ballot_sync(~0u, threadIdx.x % 32 == 4);": torch.full((64,), 16.0),
        "x[threadIdx.x] = __any_sync(~0u, threadIdx.x == 4) + 2 * __all_sync(~0u, threadIdx.x < 32);": (values < 32) * 3.0,
        "if (threadIdx.x < 8) x[threadIdx.x] += __shfl_xor_sync(0xff, x[threadIdx.x], 7);": values
        + (values < 8) * (7 - values),
        swap.format("f[threadIdx.x] = x[threadIdx.x]; __syncthreads();"): values.flip(0),
        swap.format(
            "copy_async<4>(f + threadIdx.x, x + threadIdx.x, threadIdx.x > 3); copy_commit(); copy_wait<0>(); __syncthreads();"
        ): (values * (values > 3)).flip(0),
        swap.format(  # a group that the thread does not wait for has not arrived
            "copy_async<4>(f + threadIdx.x, x + threadIdx.x); copy_commit(); copy_wait<1>(); __syncthreads();"
        ): values * torch.nan,
    }
    for body, expected in cases.items():
        got = run(list(cases), body, values.clone(), shared=256, order=order)
        assert torch.equal(got.nan_to_num(-1), expected.nan_to_num(-1)), body


def test_conversions():
    """All bfloat16 and float16, and float32 near every rounding, as PyTorch converts them; any NaN is 0x7fff as on a GPU."""
    source = """extern "C" __global__ void k(
          const short* h, float* b, float* f, const float* x, short* tb, short* tf, long long n) {
        const long long i = blockIdx.x * 1024ll + threadIdx.x;
        b[i] = from_bf16(h[i]), f[i] = from_fp16(h[i]);
        if (i < n) tb[i] = to_bf16(x[i]), tf[i] = pack_fp16(x[i], 0.f);
    }"""
    halves = torch.arange(-(2**15), 2**15).to(torch.int16)
    bits = torch.cat([halves.int() * 2**16 + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001)])
    near = torch.tensor([-1, 0, 1, 0xFFF, 0x1000, 0x1001], dtype=torch.int32)
    x = torch.cat([bits, (halves.view(torch.float16).float().view(torch.int32)[:, None] + near).flatten()]).view(torch.float32)
    tb, tf = torch.empty(2, len(x), dtype=torch.int16)
    blocks = -(-len(x) // 1024)
    b, f = torch.empty(2, blocks * 1024)
    h = torch.cat([halves, torch.zeros(blocks * 1024 - 2**16, dtype=torch.int16)])
    emulation.module(source).launch("k", (blocks, 1, 1), 1024, 0, h, b, f, x, tb, tf, len(x))
    assert torch.equal(b[: 2**16].nan_to_num(7), halves.view(torch.bfloat16).float().nan_to_num(7))
    assert torch.equal(f[: 2**16].nan_to_num(7), halves.view(torch.float16).float().nan_to_num(7))
    for got, dtype in ((tb, torch.bfloat16), (tf, torch.float16)):
        assert torch.equal(got, torch.where(x.isnan(), 0x7FFF, x.to(dtype).view(torch.int16)).to(torch.int16))
