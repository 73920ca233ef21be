"""The structure of the code keeps its measures: no import circles, annotated parameters, a short way to a native layer."""

import ast
from pathlib import Path

import emulation
import pytest
import structure

ROOT = Path(__file__).resolve().parents[1]


def package(folder: Path, **files: str) -> Path:
    (folder / "fused").mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / "fused" / f"{name}.py").write_text(text)
    return folder


def test_modules_import_in_no_circle():
    assert structure.import_circles(ROOT) == []


def test_a_circle_is_seen_within_functions_and_through_packages(tmp_path):
    lazy = "def f():\n    from .c import x\n"
    package(tmp_path, __init__="", a="from fused import b", b=lazy, c="import fused.a", d="import fused.a")
    assert structure.import_circles(tmp_path) == [["fused.a", "fused.b", "fused.c"]]
    package(tmp_path, b="x = 1")
    assert structure.import_circles(tmp_path) == []


def test_parameters_are_annotated():
    found = structure.unannotated_parameters(ROOT)
    assert len(found) < 40, found


def test_an_unannotated_parameter_is_seen(tmp_path):
    package(tmp_path, a="class A:\n    def f(self, x: int, *more, y, **rest: int):\n        g = lambda z: z\n")
    assert structure.unannotated_parameters(tmp_path) == ["fused.a:f(y)", "fused.a:f(more)"]


def test_a_native_layer_calls_few_functions():
    """49 is half of what it was when the operators were scattered over three folders, 99 functions."""
    if reason := emulation.unavailable():
        pytest.skip(reason)
    pytest.importorskip("triton", reason="the convolution's kernels are Triton's")
    functions = structure.functions_of_a_layer(ROOT)
    assert any(file.startswith("ops/mamba_inner") for file, _, _ in functions)
    assert len(functions) <= 49, "\n".join(f"{calls} {file} {name}" for file, name, calls in functions)


def test_kernels_are_launched_where_plans_see_it():
    """A launch plan repeats what `recording.launch` was told. A kernel that is called otherwise would be left out of it."""
    found = [
        f"{name}: {ast.unparse(node.func)}"
        for name, tree in structure.sources(ROOT, ("fused",)).items() if name != "fused.runtime.triton_launch"
        for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
        and ast.unparse(node.func.value).endswith("kernel")
    ]  # fmt: skip
    launches = [
        name for name, tree in structure.sources(ROOT, ("fused",)).items() if not name.startswith("fused.runtime.")
        for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node) == "module.launch"
    ]  # fmt: skip
    assert not found and not launches
