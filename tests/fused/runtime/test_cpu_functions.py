"""The vector functions of the CPU kernels over their ranges, as compiled for this CPU and for one without AVX-512."""

import ctypes
import math
import platform
import subprocess
from pathlib import Path

import pytest
import torch

from fused.runtime import cpu_library

pytestmark = pytest.mark.skipif(cpu_library.compiler() is None, reason="there is no C++ compiler")
INFINITE = (math.inf, -math.inf, math.nan)


@pytest.fixture(scope="module", params=["native", "x86-64-v3"])
def functions(request, tmp_path_factory):
    """Call a function by name on a tensor: code for this CPU, or for any x86 with AVX2."""
    if request.param != "native" and "avx2" not in " ".join(cpu_library._cpu()):
        pytest.skip(f"{platform.machine()} does not run x86-64-v3")
    made = tmp_path_factory.mktemp("functions") / "functions.so"
    flags = [f"-march={request.param}" if flag.startswith("-march") else flag for flag in cpu_library.FLAGS]
    source = Path(__file__).with_name("cpu_functions.cpp")
    header = Path(cpu_library.__file__).parent
    subprocess.run([*cpu_library.compiler(), *flags, f"-I{header}", str(source), "-o", str(made)], check=True)
    library = ctypes.CDLL(str(made))

    def call(name, x, rows=None):
        y = torch.empty(rows or x.numel(), dtype=x.dtype)
        function = getattr(library, f"{name}_{cpu_library.DTYPES[x.dtype]}")
        function(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(len(y)))
        return y

    return call


def floats(low, high, step):
    """Every step-th float32 from low to high, of both signs where they have one."""
    bits = [torch.tensor(x, dtype=torch.float32).abs().view(torch.int32).item() for x in (low, high)]
    parts = []
    if low < 0:
        parts.append(-torch.arange(0, bits[0] + 1, step, dtype=torch.int32).view(torch.float32))
    if high > 0:
        parts.append(torch.arange(0 if low <= 0 else bits[0], bits[1] + 1, step, dtype=torch.int32).view(torch.float32))
    return torch.cat(parts)


def units_off(got, truth):
    """The largest error in units of the last place of the truth, a float64."""
    exponent = torch.frexp(truth).exponent.clamp(min=-125)  # of subnormal numbers the least
    return ((got.double() - truth).abs() * torch.exp2(24.0 - exponent.double())).max().item()


@pytest.mark.parametrize("name", ["exp2", "exp", "log1p", "softplus", "sigmoid"])
def test_errs_by_few_units_of_the_last_place(functions, name):
    ranges = {"exp2": (-160, 127.9), "exp": (-110, 88.7), "log1p": (0, 1), "softplus": (-110, 19.9), "sigmoid": (-110, 110)}
    x = floats(*ranges[name], 511)
    exact = {"exp2": torch.exp2, "exp": torch.exp, "log1p": torch.log1p, "sigmoid": torch.sigmoid}
    truth = torch.log1p(x.double().exp()) if name == "softplus" else exact[name](x.double())
    assert units_off(functions(name, x), truth) <= (2.5 if name == "sigmoid" else 2)  # a quotient of two results


def test_small_decays_have_no_error_but_their_rounding(functions):
    x = floats(-(2.0**-9), -(2.0**-30), 97)[:1000000]
    assert units_off(functions("exp2", x), torch.exp2(x.double())) <= 0.51


@pytest.mark.parametrize("name", ["exp2", "exp", "softplus", "sigmoid"])
def test_float64_to_the_last_digits(functions, name):
    x = torch.linspace(-700, 300, 100003, dtype=torch.float64)
    exact = {"exp2": torch.exp2, "exp": torch.exp, "softplus": torch.nn.functional.softplus, "sigmoid": torch.sigmoid}
    got, truth = functions(name, x), exact[name](x)
    assert ((got - truth).abs() / truth).max() < 8e-16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infinite_arguments(functions, dtype):
    x = torch.tensor([*INFINITE, 1e30, -1e30, 0.0, -0.0], dtype=dtype)
    for name in ("exp2", "exp"):
        assert functions(name, x).tolist() == pytest.approx([math.inf, 0, math.nan, math.inf, 0, 1, 1], nan_ok=True), name
    assert functions("sigmoid", x).tolist() == pytest.approx([1, 0, math.nan, 1, 0, 0.5, 0.5], nan_ok=True)
    log2 = math.log(2)
    assert functions("softplus", x).tolist() == pytest.approx([math.inf, 0, math.nan, x[3].item(), 0, log2, log2], nan_ok=True)


def test_softplus_above_20_is_its_argument(functions):
    x = torch.tensor([20.0, 20.000002, 25.0, 1e4], dtype=torch.float64)
    assert torch.equal(functions("softplus", x), torch.nn.functional.softplus(x))


def test_a_value_does_not_depend_on_its_lane(functions):
    x = floats(-20, 19, 100003)
    for name in ("exp2", "exp", "softplus", "sigmoid"):
        whole, shifted = functions(name, x), functions(name, x[5:].clone())
        assert torch.equal(whole[5:], shifted), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 7, 8, 16, 33])
def test_sums_of_rows(functions, dtype, rows):
    x = torch.randint(-99, 99, (rows, 64 // dtype.itemsize)).to(dtype)  # sums are exact
    aligned = torch.empty(x.numel() + 16, dtype=dtype)
    aligned = aligned[(-aligned.data_ptr() % 64) // dtype.itemsize :][: x.numel()].copy_(x.flatten())
    assert torch.equal(functions("sums", aligned, rows), x.sum(1))
