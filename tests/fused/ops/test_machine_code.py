"""The tool that compares machine code: it sees other instructions, and only these."""

import machine_code
import pytest

from fused.runtime import nvrtc

SOURCE = 'extern "C" __global__ void k(float* x) { const float a = x[0]; x[1] = a * FACTOR + a; }'

pytestmark = pytest.mark.skipif(nvrtc.compiler_unavailable() is not None, reason=str(nvrtc.compiler_unavailable()))


def hashes(source, factor):
    return machine_code.hashes(nvrtc.compile(source, (("FACTOR", factor),), "sm_90"))


def test_other_code_has_another_hash():
    assert set(hashes(SOURCE, 3)) == {"k"}
    assert hashes(SOURCE, 3) != hashes(SOURCE, 4)


@pytest.mark.parametrize("edited", ["// comment\n" + SOURCE, SOURCE.replace(" a", " renamed"), SOURCE.replace("; ", ";\n")])
def test_names_comments_and_lines_do_not_change_the_hash(edited):
    assert edited != SOURCE and hashes(edited, 3) == hashes(SOURCE, 3)


def test_every_configuration_is_hashed_once():
    configurations = list(machine_code.configurations())
    assert len(configurations) == len(set(configurations)) == 66
    (line,) = machine_code.lines(configurations[0], "sm_90")
    assert "N=16 directions=1 io_dtype=torch.bfloat16" in line and " scan_forward " in line
