"""python -m fused.compile [--arch sm_90 ...] [--dtype bfloat16 ...] [--model middle ...]

Exit codes: 0 all kernels are in the caches; 1 a kernel did not compile or could not be kept; 2 a wrong option, or no compiler;
130 interrupted, what was compiled is kept.
"""

import argparse
import importlib.util
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from typing import Any

import torch

from fused.compile.programs import Compiled, compile_program, programs_of, title_of, unique
from fused.compile.triton_kernels import compile_triton_kernels
from fused.models.videomamba.config import VideoMambaConfig
from fused.ops.selective_scan.kernel_source import IO_DTYPES
from fused.runtime import cubin_cache, nvrtc
from fused.runtime.dtypes import dtype_name
from fused.terminal import DONE, FAILED, INTERRUPTED, USAGE, fail

DTYPES = {dtype_name(dtype): dtype for dtype in IO_DTYPES}
MODELS = ("tiny", "small", "middle", "base")


def main(arguments: Sequence[str] | None = None) -> int:
    """Fill the caches as the command line says (None: sys.argv), and return the exit code."""
    options = parser().parse_args(arguments)
    if reason := nvrtc.compiler_unavailable():
        return fail("fused.compile", reason, USAGE)
    try:
        archs = _architectures(options.arch)
        if options.batch < 1:
            raise ValueError(f"--batch is {options.batch}; allowed: 1 or more")
        sizes = {"num_frames": options.frames, "img_size": options.size}
        configs = [getattr(VideoMambaConfig, name)(**sizes) for name in unique(options.model)]
    except (ValueError, TypeError) as error:
        return fail("fused.compile", error, USAGE)
    return _fill(archs, [DTYPES[name] for name in unique(options.dtype)], configs, options.batch)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    command = argparse.ArgumentParser(
        prog="python -m fused.compile",
        description="Compile the kernels of VideoMamba before they are used for the first time, for example while a container "
        "image is built, and keep them in the cache folders. No GPU is needed.",
        epilog="A first use compiles what is missing. What is here already is not compiled again. The folders follow "
        "XDG_CACHE_HOME and TRITON_CACHE_DIR. They serve the same versions of this package, PyTorch and the compilers. "
        "Streaming and chunks compile more kernels at their first use.",
    )
    command.add_argument("--arch", nargs="+", metavar="sm_90", help="architectures of the GPUs to compile for, such as sm_80 "
                         "(A100), sm_90 (H100, H200) or sm_100 (B200); default: that of the GPU here")  # fmt: skip
    command.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"],
                         help="dtypes of the model, or of autocast; default: bfloat16")  # fmt: skip
    command.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS), help="sizes of the model; default: all")
    command.add_argument("--frames", type=int, default=8, help="frames of a clip; default: 8")
    command.add_argument("--size", type=int, default=224, help="height and width of a frame in pixels; default: 224")
    command.add_argument("--batch", type=int, default=8, help="clips of a batch; default: 8. The kernels are the same for most "
                         "numbers of frames, sizes and batches")  # fmt: skip
    return command


def _architectures(asked: Sequence[str] | None) -> list[str]:
    """Return the architectures that were asked for, or that of the GPU here. Raises ValueError for what cannot be compiled."""
    if not asked and not torch.cuda.is_available():
        raise ValueError("there is no GPU here whose architecture could be taken: give --arch, such as --arch sm_80 sm_90")
    archs, known = unique(asked or [nvrtc.arch_of()]), nvrtc.architectures()
    for arch in archs:
        if arch not in known:
            raise ValueError(f"--arch is {arch!r}; allowed: {', '.join(known)}")
    return archs


def _fill(archs: list[str], dtypes: list[torch.dtype], configs: list[VideoMambaConfig], batch: int) -> int:
    """Compile in all threads and processes that there are CPUs for, print a line for each kernel, and return the exit code."""
    begun, counts, has_triton = time.perf_counter(), Counter[str](), importlib.util.find_spec("triton") is not None
    threads = ThreadPoolExecutor(os.cpu_count() or 1)
    tasks: dict[Future[Any], tuple[str, str]] = {}  # what a line begins with, and what a failure names
    try:
        for arch in archs:
            for dtype in dtypes:
                label = f"{arch} {dtype_name(dtype)}"
                if has_triton:
                    arguments = (int(arch.removeprefix("sm_")), dtype, configs)
                    tasks[threads.submit(_in_own_process, compile_triton_kernels, *arguments)] = label, "Triton kernels"
                for program in dict.fromkeys(p for config in configs for p in programs_of(config, dtype, batch)):
                    tasks[threads.submit(compile_program, program, arch)] = label, title_of(program)
        for number, task in enumerate(as_completed(tasks), 1):
            label, title = tasks[task]
            counts += _report(f"[{number}/{len(tasks)}] {label}", title, task)
    except KeyboardInterrupt:
        return fail("fused.compile", "interrupted; what was compiled is kept", INTERRUPTED)
    finally:
        threads.shutdown(cancel_futures=True)
    results = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("compiled", "from the cache", "failed"))
    print(f"{results}, in {time.perf_counter() - begun:.1f} s")
    print(f"kernels are in {cubin_cache.folder()}")
    print(f"Triton keeps its own in {_triton_folder()}" if has_triton else "no Triton here: its kernels wait for first use")
    return FAILED if counts["failed"] else DONE


def _in_own_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """Return `work(*arguments)`, run by a new process: a fork would inherit locks of threads that compile."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


def _report(label: str, title: str, task: Future[Any]) -> Counter[str]:
    """Print what became of a task, a line for each of its kernels, and return how often each outcome occurred."""
    if error := task.exception():
        print(f"{label} {title}: failed: {type(error).__name__}: {error}", flush=True)
        return Counter(["failed"])
    result: Any = task.result()
    counts = Counter[str]()
    for kernel in [result] if isinstance(result, Compiled) else result:
        outcome = "from the cache" if kernel.from_cache else "compiled"
        counts[outcome] += 1
        print(f"{label} {kernel.name}: {outcome}" + ("" if kernel.from_cache else f" in {kernel.seconds:.1f} s"), flush=True)
    return counts


def _triton_folder() -> str:
    import triton

    return str(triton.knobs.cache.dir)


if __name__ == "__main__":
    sys.exit(main())
