"""Compiles the Triton kernels that a launch function launches, without a GPU, and reports the resources that they need.

    python compiled.py conv 90 100      registers, shared memory and spills of each kernel for sm_90 and sm_100

It runs in its own process, because a process with Triton's interpreter on cannot compile.
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

import compilers
import torch

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}
TOOLS = pathlib.Path(importlib.util.find_spec("triton").origin).parent / "backends/nvidia/bin"
BF16, FP32 = torch.bfloat16, torch.float32


def launches_of_conv():
    """Yield (case, module, kernel names, launch function): both directions at once, and one direction with a state."""
    from fused.ops.causal_conv1d import launch as conv

    def launch(K, dtype, states, reverses, ids=None):
        x = torch.empty(1, 70, 2 * 128, dtype=dtype)[..., :128]
        weights = [torch.empty(128, K) for _ in reverses]
        biases = [torch.empty(128) for _ in reverses]
        initial_states = [torch.empty(1, 128, K - 1, dtype=dtype) for _ in reverses] if states else None
        dy = torch.empty(len(reverses), 1, 70, 128, dtype=dtype)
        conv.forward(x, weights, biases, initial_states, reverses, True, seq_idx=ids)
        conv.backward(dy, initial_states, x, weights, biases, initial_states, reverses, True, dx=x, seq_idx=ids)

    kernels = ("forward_kernel", "backward_kernel", "reduce_kernel")
    yield "both bf16", conv, kernels, lambda: launch(4, BF16, False, (False, True))
    yield "both fp32", conv, kernels, lambda: launch(4, FP32, False, (False, True))
    yield "state bf16", conv, kernels, lambda: launch(4, BF16, True, (False,))
    yield "reverse state bf16", conv, kernels, lambda: launch(4, BF16, True, (True,))
    ids = torch.zeros(1, 70, dtype=torch.int32)
    yield "segments bf16", conv, kernels, lambda: launch(4, BF16, False, (False,), ids)
    yield "segments, reverse state bf16", conv, kernels, lambda: launch(4, BF16, True, (True,), ids)


def launches_of_norm():
    """Yield the same for RMSNorm and LayerNorm of several widths."""
    from fused.ops.add_norm import launch as norm

    def launch(D, dtype, bias):
        x, residual, weight = torch.empty(33, D, dtype=dtype), torch.empty(33, D), torch.empty(D)
        bias = weight if bias else None
        y, out, mean, rstd = norm.forward(x, residual, weight, bias, 1e-5, bias is not None, FP32)
        norm.backward(y, out, out, None, weight, bias, mean, rstd, dtype, FP32)

    kernels = ("forward_kernel", "backward_kernel", "reduce_kernel")
    for D, bias in ((192, False), (384, False), (576, False), (576, True), (8192, True)):
        yield f"{'layer' if bias else 'rms'} D{D} bf16", norm, kernels, lambda D=D, bias=bias: launch(D, BF16, bias)
    yield "rms D576 fp32", norm, kernels, lambda: launch(576, FP32, False)


def launches_of_steps():
    """Yield the same for dt_proj with softplus, the packing of weights, and the backward of the gate."""
    from fused.ops.mamba_inner import kernels, wide_dt_proj_kernels

    def launch(R, dtype):
        rows, weights, bias = torch.empty(2, 70, R + 32, dtype=dtype), torch.empty(2, R, 128, dtype=dtype), torch.empty(128)
        kernels.dt_proj_softplus(rows, weights, (bias, bias))

    for R, dtype in ((16, BF16), (40, BF16), (40, FP32)):
        yield f"R{R} {DTYPE_NAMES[dtype]}", kernels, ("dt_proj_softplus_kernel",), lambda R=R, dtype=dtype: launch(R, dtype)
    yield "R224 bf16", wide_dt_proj_kernels, ("wide_dt_proj_softplus_kernel",), lambda: launch(224, BF16)
    proj, dt = torch.empty(68, 128, dtype=BF16), torch.empty(128, 36, dtype=BF16)
    for dtype in (BF16, FP32):
        A, D, A_fp32 = torch.empty(128, 16, dtype=dtype), torch.empty(128, dtype=dtype), torch.empty(128, 16)
        arguments = (proj, proj), (dt, dt), (A, A_fp32), (D, D), 40, BF16
        pack = lambda arguments=arguments: kernels.pack_weights(*arguments)  # noqa: E731
        yield f"pack bf16, A {DTYPE_NAMES[dtype]}", kernels, ("pack_weights_kernel",), pack
    linears = torch.empty(256, 64), torch.empty(64, 128)
    arguments = (proj.float(),), (dt.float(),), (A_fp32,), (D,), 40, BF16, linears
    yield "pack fp32 to bf16 with linears", kernels, ("pack_weights_kernel",), lambda: kernels.pack_weights(*arguments)
    gradients = (torch.empty(72, 128),) * 2, (torch.empty(128, 40),) * 2, (proj.float(),) * 2, (dt.float(),) * 2
    yield "unpack fp32", kernels, ("unpack_gradients_kernel",), lambda: kernels.unpack_gradients(*gradients)
    dy, xz = torch.empty(2, 70, 128, dtype=BF16), torch.empty(2, 70, 256, dtype=BF16)
    yield "gate bf16", kernels, ("silu_gate_backward_kernel",), lambda: kernels.silu_gate_backward(dy, xz[..., 128:])


def launches_of_ssd():
    """Yield the same for Vamba's sizes, with all that the scan has, and for small ones in float32, forward and backward."""
    from fused.ops.ssd import launch as ssd
    from fused.ops.ssd import launch_backward as ssd_backward

    def launch(H, P, G, N, dtype, full, backward):
        x, z = torch.empty(2, 1, 2000, H, P, dtype=dtype).unbind(0)
        B = torch.empty(1, 2000, G, N, dtype=dtype)
        dt, A = torch.empty(1, 2000, H, dtype=dtype), torch.empty(H)
        ids, state = (torch.zeros(1, 2000, dtype=torch.int32), torch.empty(1, H, P, N)) if full else (None, None)
        arguments = x, dt, A, B, B, A, z if full and not backward else None, A, True, 0.0, 1.0, state, ids, full
        ssd_backward.backward(x, state, *arguments) if backward else ssd.forward(*arguments, want_final=full)

    kernels = ("steps_kernel", "states_kernel", "scan_kernel")
    gradients = "both_states_kernel", "state_gradient_kernel", "input_gradient_kernel", "steps_backward_kernel", "reduce_kernel"
    vars(ssd)["NATIVE"] = True  # as on a GPU, also where tests import this
    large, largest, precise = (112, 64, 1, 128, BF16), (8, 128, 1, 256, BF16), (8, 128, 1, 256, FP32)
    older = [(capability, size) for capability in (80, 90) for size in (large, largest, precise)]
    sizes = [*older, (100, large), (100, precise), (0, (4, 16, 2, 16, FP32))]
    yield "plain bf16 sm_90", ssd, kernels, lambda: launch_for(90, launch, *large, False, False)
    for capability, (H, P, G, N, dtype) in sizes:
        name = f"H{H} P{P} G{G} N{N} {DTYPE_NAMES[dtype]}" + f" sm_{capability}" * bool(capability)
        yield name, ssd, kernels, lambda a=(H, P, G, N, dtype, True, False), c=capability: launch_for(c, launch, *a)
        for kernel in kernels:  # they would run on the CPU
            vars(ssd)[kernel] = Recorder(vars(ssd)[kernel])
        call = lambda a=(H, P, G, N, dtype, True, True), c=capability: launch_for(c, launch, *a)  # noqa: E731
        yield name, ssd_backward, gradients, call
        for kernel in kernels:
            vars(ssd)[kernel] = vars(ssd)[kernel].kernel


def launch_for(capability, launch, *arguments):
    """Launch kernels with the options that they have on a compute capability."""
    from fused.runtime import ahead

    with ahead.compiling(capability, lambda kernel, args, constants: kernel[(1, 1, 1)](*args, **constants)):
        launch(*arguments)


def launches_of_split_attention():
    """Yield the same for Vamba's heads, one token and several, and for float32."""
    from fused.ops.split_attention import launch

    def call(R, C, dtype):
        q, k = torch.empty(1, 4, R, C, dtype=dtype), torch.empty(1, 4, 2000, C, dtype=dtype)
        launch.forward(q, k, k)

    for R, C, dtype in ((7, 128, BF16), (56, 128, BF16), (7, 128, FP32)):
        name = f"R{R} C{C} {DTYPE_NAMES[dtype]}"
        yield name, launch, ("split_kernel", "join_kernel"), lambda R=R, C=C, dtype=dtype: call(R, C, dtype)


class Recorder:
    """Replaces a kernel and records the arguments of each launch."""

    def __init__(self, kernel):
        self.kernel, self.calls = kernel, []

    def __getitem__(self, grid):
        return lambda *args, **options: self.calls.append((args, options))


def compiler_arguments(kernel, args, options):
    """Return (signature, constants, attributes, options) as a launch with these arguments gives them to the compiler."""
    signature, constants, attributes = {}, {}, {}
    not_specialized = {p.name for p in kernel.params if p.do_not_specialize}
    names, constexprs = kernel.arg_names, {p.name for p in kernel.params if p.is_constexpr}
    for index, (name, value) in enumerate(zip(names, args, strict=False)):
        if value is None or name in constexprs or (type(value) is int and value == 1 and name not in not_specialized):
            signature[name], constants[name] = "constexpr", value
            continue
        integer = value.data_ptr() if isinstance(value, torch.Tensor) else value
        signature[name] = (
            f"*{DTYPE_NAMES[value.dtype]}" if isinstance(value, torch.Tensor) else {int: "i32", float: "fp32"}[type(value)]
        )
        if isinstance(integer, int) and integer % 16 == 0 and name not in not_specialized:
            attributes[(index,)] = [["tt.divisibility", 16]]
    for name in list(options):
        if name in names:
            signature[name], constants[name] = "constexpr", options[name]
    return signature, constants, attributes, {k: v for k, v in options.items() if k not in names}


def resources(kernel, signature, constants, attributes, options, capability):
    """Return the resources of the compiled kernel. These kernels use the stack for nothing but spilled registers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [TOOLS / "cuobjdump", "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    return {"registers": registers, "stack": stack, "shared": binary.metadata.shared, "warps": binary.metadata.num_warps}


def main(op, *capabilities):
    """Print a line of JSON for each kernel of an operator and each compute capability."""
    seen = []
    for case, module, kernel_names, launch in globals()[f"launches_of_{op}"]():
        kernels = {name: getattr(module, name) for name in kernel_names}
        recorders = {name: Recorder(kernel) for name, kernel in kernels.items()}
        vars(module).update(recorders)
        launch()
        vars(module).update(kernels)
        for name, recorder in recorders.items():
            for call in recorder.calls:
                arguments = compiler_arguments(recorder.kernel, *call)
                *types, options = arguments
                assert options.get("enable_fp_fusion") is True, f"{name}: the launch leaves a * b + c to Triton's default"
                for capability in map(int, capabilities):
                    if "sm_" in case and f"sm_{capability}" not in case.split():
                        continue  # this configuration is for others
                    if (seen_here := (name, capability, arguments)) in seen:
                        continue
                    seen.append(seen_here)
                    tuned = getattr(module, "CAPABILITY_OPTIONS", {}).get(capability, {}) if "bf16" in case else {}
                    found = resources(recorder.kernel, *types, options | tuned, capability)
                    print(json.dumps({"case": case, "kernel": name, "sm": capability} | found), flush=True)


def compile_in_subprocess(op):
    """Return the lines of `main` for sm_80, sm_90 and sm_100; skip the test where Triton cannot compile.

    Triton caches binaries on disk by source, version and options. Those older than a week are deleted.
    """
    import pytest

    if not all((TOOLS / tool).exists() for tool in ("ptxas", "cuobjdump")):
        pytest.skip(f"no ptxas and cuobjdump in Triton's folder {TOOLS}")
    folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "videomamba-bench" / "compiled"
    for cached in folder.glob("*"):
        if cached.stat().st_mtime < time.time() - 7 * 86400:
            shutil.rmtree(cached, ignore_errors=True)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, op, "80", "90", "100"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_no_spills(lines):
    """Fail if a kernel uses the stack; only warn with another Triton than the one whose kernels were measured."""
    over = [f"{x['kernel']} of {x['case']} on sm_{x['sm']}: {x['stack']} bytes of stack" for x in lines if x["stack"]]
    compilers.fail_or_warn("Triton", over)


if __name__ == "__main__":
    main(*sys.argv[1:])
