"""Measures of the code's structure: `python tests/structure.py [CHECKOUT]` prints them for any checkout.

- import circles: strongly connected modules, imports within functions and under TYPE_CHECKING counted as any
- unannotated parameters of functions in `fused`, `self` and `cls` aside
- Python functions that one forward of a native bidirectional layer calls under the kernels' emulation, kernels aside, by its
  launch plan
"""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("reference", "fused", "harness")
FUNCTIONS = """
import collections, json, os, sys
sys.path[:0] = [os.getcwd(), *(os.path.join(os.getcwd(), "tests/fused", folder) for folder in ("runtime", "kernels"))]
import warnings
import torch
import emulation
from fused import VideoMamba, VideoMambaConfig, backends
try:
    from fused.runtime import nvrtc
except ImportError:  # before it moved there
    from fused.kernels import nvrtc
try:
    from fused.runtime import plans
    on = plans.enabled(True, "cpu")
    on.__enter__()
except ImportError:  # before there were any
    pass
warnings.simplefilter("ignore")
torch.set_num_threads(1)
nvrtc.module = emulation.module
backends.unavailable = lambda backend, device: None
config = VideoMambaConfig(embed_dim=32, depth=1, img_size=32, num_frames=2, num_classes=3)
layer = VideoMamba(config, backend="native").eval().layers[0]
tokens, residual = torch.randn(2, 1, 19, 32)
here, calls = os.path.join(os.getcwd(), "fused") + os.sep, collections.Counter()

def count(frame, event, argument):
    code = frame.f_code
    if event == "call" and code.co_filename.startswith(here):
        calls[code.co_filename[len(here):], code.co_qualname] += 1

for _ in range(2):
    layer(tokens, residual, backend="native")
sys.setprofile(count)
layer(tokens, residual, backend="native")
sys.setprofile(None)
print(json.dumps([[*key, number] for key, number in calls.items()]))
"""


def sources(root: Path, packages: tuple[str, ...] = PACKAGES) -> dict[str, ast.Module]:
    """Return the syntax tree of every module of these packages by its dotted name."""
    paths = [path for package in packages for path in sorted((root / package).rglob("*.py"))]
    names = {path: ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for path in paths}
    return {name: ast.parse(path.read_text(encoding="utf-8")) for path, name in names.items()}


def imports(root: Path) -> dict[str, set[str]]:
    """Return which modules each module imports, of those in PACKAGES."""
    trees = sources(root)
    packages = {name for name in trees if any(other.startswith(name + ".") for other in trees)}

    def targets(module: str, node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level + (module in packages) or None] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{source}.{alias.name}" if f"{source}.{alias.name}" in trees else source

    found = {name: {t for node in ast.walk(tree) for t in targets(name, node)} for name, tree in trees.items()}
    return {name: {t for t in targets if t in trees and t != name} for name, targets in found.items()}


def import_circles(root: Path) -> list[list[str]]:
    """Return the groups of modules of which each imports every other, directly or not."""
    arrows, reached = imports(root), {}
    for start in arrows:
        seen, waiting = set(), list(arrows[start])
        while waiting:
            if (name := waiting.pop()) not in seen:
                seen.add(name)
                waiting += arrows[name]
        reached[start] = seen
    groups = {frozenset(n for n in reached[m] if m in reached[n]) for m in arrows if m in reached[m]}
    return sorted(sorted(group) for group in groups)


def unannotated_parameters(root: Path, package: str = "fused") -> list[str]:
    """Return `module:function(parameter)` for each parameter without an annotation."""
    found = []
    for name, tree in sources(root, (package,)).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                own = node.args
                every = [*own.posonlyargs, *own.args, *own.kwonlyargs, *filter(None, (own.vararg, own.kwarg))]
                names = [a.arg for a in every if a.annotation is None and a.arg not in ("self", "cls")]
                found += [f"{name}:{node.name}({argument})" for argument in names]
    return found


def kernel_functions(root: Path) -> set[tuple[str, str]]:
    """Return (file within fused, name) of the functions that Triton compiles; its interpreter calls them as Python."""
    found = set()
    for path in (root / "fused").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                found.add((str(path.relative_to(root / "fused")), node.name))
    return found


def functions_of_a_layer(root: Path) -> list[tuple[str, str, int]]:
    """Return (file, function, calls) of the host's functions in one forward of a native layer; needs g++ and Triton."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", FUNCTIONS], cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    kernels = kernel_functions(root)
    return [(file, name, calls) for file, name, calls in json.loads(done.stdout) if (file, name) not in kernels]


def main() -> None:
    """Print the numbers of a checkout."""
    root = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT
    circles, functions = import_circles(root), functions_of_a_layer(root)
    print(f"import circles: {len(circles)}")
    for circle in circles:
        print("   ", ", ".join(circle))
    print(f"unannotated parameters in fused: {len(unannotated_parameters(root))}")
    files = {file for file, _, _ in functions}
    print(f"host functions of a native layer's forward: {len(functions)} over {len(files)} files")


if __name__ == "__main__":
    main()
