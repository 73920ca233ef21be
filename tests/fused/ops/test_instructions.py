"""Instructions for each exponential in the loops of the selective scan, by which its time is bound: counted in machine code."""

import re
import subprocess
from typing import NamedTuple

import compiled
import compilers
import pytest
import torch

from fused.ops.selective_scan import kernel_source, schedule
from fused.ops.selective_scan.kernel_source import SOFTPLUS_BY_CALLER
from fused.runtime import nvrtc

NVDISASM = compiled.TOOLS / "nvdisasm"


class Loop(NamedTuple):
    """A loop that has exponentials, with the loops within it."""

    instructions: int
    exponentials: int


# Of a mixer's programs on sm_90, (program, kept states): the most instructions of the largest loop with so many exponentials.
# A tile of 16 tokens and 16 channels has 128 decays a lane in the forward. Its loops over tiles make outputs (136), a state
# pass (128), and one by moments, which has both ways to take a tile (40). The backward's loops: over tiles (74), with that
# over subtiles in it (34), and the state pass (40).
LIMITS = {
    ("forward", False): {136: 1194, 128: 696, 40: 647},
    ("forward", True): {136: 1158, 128: 700},
    ("backward", True): {74: 1373, 40: 324, 34: 692},
}


def loops(code: str) -> dict[str, list[Loop]]:
    """Return the loops of each kernel in the text of nvdisasm: what lies between a label and a branch back to it."""
    found: dict[str, list[Loop]] = {}
    for kernel, body in re.findall(r"^\.text\.(\w+):\n(.*?)(?=^\.text\.|\Z)", code, re.M | re.S):
        instructions, labels = [], {}
        for line in body.splitlines():
            if label := re.match(r"(\.L\w+):", line):
                labels[label[1]] = len(instructions)
            elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
                instructions.append(instruction[1])
        found[kernel] = []
        for at, instruction in enumerate(instructions):
            to = re.search(r"\bBRA\b.*(\.L\w+)", instruction)
            inside = instructions[labels[to[1]] : at + 1] if to and to[1] in labels else []
            if exponentials := sum("MUFU.EX2" in i for i in inside):
                found[kernel].append(Loop(len(inside), exponentials))
    return found


def disassembled(cubin: bytes, folder) -> str:
    path = folder / "code.cubin"
    path.write_bytes(cubin)
    return subprocess.run([NVDISASM, "-c", path], capture_output=True, text=True, check=True).stdout


def test_loops_are_found_with_those_within_them(tmp_path):
    if reason := nvrtc.compiler_unavailable() or (None if NVDISASM.exists() else f"no nvdisasm in {NVDISASM.parent}"):
        pytest.skip(reason)
    source = """extern "C" __global__ void k(float* x, long long n) {
        x[0] = exp2f(x[0]);
        #pragma unroll 1
        for (long long i = 0; i < n; i++) {
            #pragma unroll 1
            for (long long j = 0; j < n; j++) asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(x[j]));
            asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(x[i]));
        }
    }"""
    [(kernel, found)] = loops(disassembled(nvrtc.compile(source, (), "sm_90"), tmp_path)).items()
    assert kernel == "k" and [loop.exponentials for loop in found] == [1, 2]
    assert 3 < found[0].instructions < found[1].instructions < 80


@pytest.mark.parametrize(("program", "keeps"), LIMITS, ids=str)
def test_instructions_for_each_exponential(program, keeps, tmp_path, capsys):
    if reason := nvrtc.compiler_unavailable() or (None if NVDISASM.exists() else f"no nvdisasm in {NVDISASM.parent}"):
        pytest.skip(reason)
    macros = kernel_source.defines(
        io_dtype=torch.bfloat16, schedule=schedule.make_schedule(1, 16, 64, 16, 2, 1), directions=2, vectorized=True,
        vectorized_bc=True, no_padding=True, softplus=SOFTPLUS_BY_CALLER, has_z=True, store_tile_states=keeps,
    )  # fmt: skip
    code = disassembled(nvrtc.compile(kernel_source.source(program), macros, "sm_90"), tmp_path)
    found, over = loops(code)[f"scan_{program}"], []
    for exponentials, most in LIMITS[program, keeps].items():
        largest = max((loop.instructions for loop in found if loop.exponentials == exponentials), default=None)
        if largest is None:
            over.append(f"{program}: no loop has {exponentials} exponentials, but {sorted({x.exponentials for x in found})}")
            continue
        with capsys.disabled():
            each = largest / exponentials
            print(f"\n{program}: {largest} instructions, {exponentials} exponentials, {each:.2f} each", end="")
        if largest > most:
            over.append(f"{program}: {largest} instructions for {exponentials} exponentials, {most} before")
    compilers.fail_or_warn("NVRTC", over)
