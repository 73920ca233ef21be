"""What the compiler makes of the Triton kernels that a launch function launches, without a GPU.

    python compiled.py conv 90 100      registers, shared memory and spills of each kernel for sm_90 and sm_100

Runs in a process of its own, because a process with Triton's interpreter on cannot compile.
"""

import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

import torch

PLAIN = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
TOOLS = pathlib.Path(importlib.util.find_spec("triton").origin).parent / "backends/nvidia/bin"
BF16, FP32 = torch.bfloat16, torch.float32


def launches_of_conv():
    """(name, kernels, what launches them): the mixer's shapes, both directions and one that carries a state."""
    from fused.ops.causal_conv1d import launch as conv

    def both(K, dtype, states, reverses):
        x = torch.empty(1, 70, 2 * 128, dtype=dtype)[..., :128]
        weights = [torch.empty(128, K) for _ in reverses]
        biases = [torch.empty(128) for _ in reverses]
        held = [torch.empty(1, 128, K - 1, dtype=dtype) for _ in reverses] if states else None
        dy = torch.empty(len(reverses), 1, 70, 128, dtype=dtype)
        conv.forward(x, weights, biases, held, reverses, True)
        conv.backward(dy, held, x, weights, biases, held, reverses, True, dx=x)

    kernels = ("forward_kernel", "backward_kernel", "reduce_kernel")
    yield "both bf16", conv, kernels, lambda: both(4, BF16, False, (False, True))
    yield "both fp32", conv, kernels, lambda: both(4, FP32, False, (False, True))
    yield "state bf16", conv, kernels, lambda: both(4, BF16, True, (False,))
    yield "state at the back bf16", conv, kernels, lambda: both(4, BF16, True, (True,))


def launches_of_norm():
    from fused.ops.add_norm import launch as norm

    def one(D, dtype, bias):
        x, residual, weight = torch.empty(33, D, dtype=dtype), torch.empty(33, D), torch.empty(D)
        bias = weight if bias else None
        y, out, mean, rstd = norm.forward(x, residual, weight, bias, 1e-5, bias is not None, FP32)
        norm.backward(y, out, out, None, weight, bias, mean, rstd, dtype, FP32)

    kernels = ("forward_kernel", "backward_kernel", "reduce_kernel")
    for D, bias in ((192, False), (384, False), (576, False), (576, True), (8192, True)):
        yield f"{'layer' if bias else 'rms'} D{D} bf16", norm, kernels, lambda D=D, bias=bias: one(D, BF16, bias)
    yield "rms D576 fp32", norm, kernels, lambda: one(576, FP32, False)


def launches_of_steps():
    from fused.ops.mamba_inner import kernels

    def one(R, dtype):
        rows, weights, bias = torch.empty(2, 70, R + 32, dtype=dtype), torch.empty(2, R, 128, dtype=dtype), torch.empty(128)
        kernels.dt_proj_softplus(rows, weights, (bias, bias))

    for R, dtype in ((16, BF16), (40, BF16), (40, FP32)):
        yield f"R{R} {PLAIN[dtype]}", kernels, ("dt_proj_softplus_kernel",), lambda R=R, dtype=dtype: one(R, dtype)
    proj, dt = torch.empty(68, 128, dtype=BF16), torch.empty(128, 36, dtype=BF16)
    for dtype in (BF16, FP32):
        A, D, wide = torch.empty(128, 16, dtype=dtype), torch.empty(128, dtype=dtype), torch.empty(128, 16)
        every = (proj, proj), (dt, dt), (A, wide), (D, D), 40
        pack = lambda every=every: kernels.pack_weights(*every)  # noqa: E731
        yield f"pack bf16, A {PLAIN[dtype]}", kernels, ("pack_weights_kernel",), pack
    dy, xz = torch.empty(2, 70, 128, dtype=BF16), torch.empty(2, 70, 256, dtype=BF16)
    yield "gate bf16", kernels, ("silu_gate_backward_kernel",), lambda: kernels.silu_gate_backward(dy, xz[..., 128:])


class Recorder:
    """Stands in for a kernel and keeps the arguments of each launch."""

    def __init__(self, kernel):
        self.kernel, self.calls = kernel, []

    def __getitem__(self, grid):
        return lambda *args, **options: self.calls.append((args, options))


def described(kernel, args, options):
    """(signature, constants, attributes, options) as a launch with these arguments would give them to the compiler."""
    signature, constants, attributes = {}, {}, {}
    free = {p.name for p in kernel.params if p.do_not_specialize}
    names, fixed = kernel.arg_names, {p.name for p in kernel.params if p.is_constexpr}
    for place, (name, value) in enumerate(zip(names, args, strict=False)):
        if value is None or name in fixed or (type(value) is int and value == 1 and name not in free):
            signature[name], constants[name] = "constexpr", value
            continue
        number = value.data_ptr() if isinstance(value, torch.Tensor) else value
        signature[name] = (
            f"*{PLAIN[value.dtype]}" if isinstance(value, torch.Tensor) else {int: "i32", float: "fp32"}[type(value)]
        )
        if isinstance(number, int) and number % 16 == 0 and name not in free:
            attributes[(place,)] = [["tt.divisibility", 16]]
    for name in list(options):
        if name in names:
            signature[name], constants[name] = "constexpr", options[name]
    return signature, constants, attributes, {k: v for k, v in options.items() if k not in names}


def resources(kernel, signature, constants, attributes, options, capability):
    """What the binary takes; ptxas keeps spilled registers on the stack, where these kernels have nothing else."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        said = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{word}:(\d+)", said)[1]) for word in ("REG", "STACK"))
    return {"registers": registers, "stack": stack, "shared": made.metadata.shared, "warps": made.metadata.num_warps}


def main(op, *capabilities):
    seen = []
    for name, module, kernels, launch in globals()[f"launches_of_{op}"]():
        kept = {k: getattr(module, k) for k in kernels}
        recorders = {k: Recorder(v) for k, v in kept.items()}
        vars(module).update(recorders)
        launch()
        vars(module).update(kept)
        for kernel, recorder in recorders.items():
            for call in recorder.calls:
                if (kernel, asked := described(recorder.kernel, *call)) in seen:
                    continue
                seen.append((kernel, asked))
                *what, options = asked
                for capability in map(int, capabilities):
                    own = getattr(module, "TUNED", {}).get(capability, {}) if "bf16" in name else {}
                    found = resources(recorder.kernel, *what, options | own, capability)
                    print(json.dumps({"case": name, "kernel": kernel, "sm": capability} | found), flush=True)


def ask(op):
    """The lines of `main` for sm_80, sm_90 and sm_100; skips the test where Triton cannot compile. Triton keeps what it has
    compiled on disk, by the source, its own version and all options; what is a week old goes."""
    import pytest

    if not all((TOOLS / tool).exists() for tool in ("ptxas", "cuobjdump")):
        pytest.skip(f"Triton brings no ptxas and cuobjdump: {TOOLS}")
    folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "videomamba-bench" / "compiled"
    for kept in folder.glob("*"):
        if kept.stat().st_mtime < time.time() - 7 * 86400:
            shutil.rmtree(kept, ignore_errors=True)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, op, "80", "90", "100"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


if __name__ == "__main__":
    main(*sys.argv[1:])
