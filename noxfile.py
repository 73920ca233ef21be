"""What people type: `nox -s parity`, `nox -s tests`, ... Words after `--` go on to the program behind the session.

On a box with PyTorch and no network, `nox --no-venv -s parity` installs nothing and runs from the checkout.
"""

import os
import shutil
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["tests"]
nox.options.reuse_venv = "yes"

NVIDIA = shutil.which("nvidia-smi")
PROJECT = nox.project.load_toml("pyproject.toml")
UPSTREAM = PROJECT["project"]["optional-dependencies"]["upstream"]
EXTRAS = ("base", "train", "evaluate", "hub", "onnx", "teachers", "language", "timm", "harness")  # those that need no GPU
TEST, LINT, TYPES, PAGES = (nox.project.dependency_groups(PROJECT, group) for group in ("test", "lint", "types", "pages"))


def install(session: nox.Session, *requirements: str, **options) -> None:
    """Install into the session's own venv; without one the box has to hold what is needed already."""
    if session.venv_backend != "none":
        pins = () if NVIDIA else ("-c", "constraints-cpu.txt")
        session.install(*pins, *requirements, **options)


def python(session: nox.Session, *arguments: str, **variables: str) -> None:
    """Run Python on the checkout, which goes before whatever else bears the name `fused` on this box.

    `variables` are set in its environment.
    """
    program = sys.executable if session.venv_backend == "none" else "python"
    path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    patience = {"interrupt_timeout": 60.0, "terminate_timeout": 10.0}  # Ctrl-C: a run keeps what it has and says how it goes on
    session.run(program, *arguments, env={"PYTHONPATH": path} | variables, external=session.venv_backend == "none", **patience)


@nox.session
def tests(session: nox.Session) -> None:
    """The tests, one process a core; they need no GPU."""
    install(session, "-e", ".[harness,train]", *TEST)
    shared = ("-n", "auto", "--dist", "worksteal") if session.venv_backend != "none" else ()
    python(session, "-m", "pytest", *shared, *session.posargs)


@nox.session
def pages(session: nox.Session) -> None:
    """The rendered pages in the system's Chromium, on a screen and on a phone (on Debian: apt-get install chromium)."""
    install(session, "-e", ".[harness,train]", *PAGES)
    python(session, "-m", "pytest", "tests/browser", *session.posargs)


@nox.session
def extras(session: nox.Session) -> None:
    """Install each extra by itself, beside one PyTorch, and run what the pages show for it; `-- train hub` takes some."""
    if session.venv_backend == "none":
        session.error("extras makes environments of its own: run it without --no-venv")
    install(session, "torch")
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    torch_folder = session.run("python", "-c", where, silent=True)
    pins = () if NVIDIA else ("-c", "constraints-cpu.txt")
    for extra in session.posargs or EXTRAS:
        folder = Path(session.create_tmp(), extra)
        session.run("python", "-m", "venv", "--clear", "--without-pip", str(folder))
        own = str(folder / "bin/python")
        [packages] = folder.glob("lib/python*/site-packages")
        (packages / "torch.pth").write_text(torch_folder)  # Python looks there last: the extra's own packages go before
        what = "." if extra == "base" else f".[{extra}]"
        session.run("python", "-m", "pip", "--python", own, "install", "--quiet", *pins, "-e", what)
        session.run(own, "tests/extras.py", extra, external=True)


@nox.session(reuse_venv=False)
@nox.parametrize("stack", ["oldest", "newest"])
def compat(session: nox.Session, stack: str) -> None:
    """The tests on the oldest and on the newest versions that pyproject.toml allows, which `doctor` calls tested then.

    On Linux PyTorch comes as a CUDA build, of 8 GB; no GPU is needed.
    """
    if session.venv_backend == "none":
        session.error("compat makes environments of its own: run it without --no-venv")
    session.install("uv")
    choice = {"oldest": "lowest-direct", "newest": "highest"}[stack]
    what = [f"--extra={extra}" for extra in ("harness", "native", "hub", "train", "teachers", "onnx")]
    session.run("uv", "pip", "install", f"--resolution={choice}", "-r", "pyproject.toml", *what, "--group", "test")
    python(session, "-m", "pytest", "-n", "auto", "--dist", "worksteal", *session.posargs)
    if not session.posargs:  # all tests passed
        python(session, "tests/compat.py", stack)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Ask operators, configurations and readers 10,000 random things each; the tests ask 200."""
    install(session, "-e", ".[harness,train]", *TEST)
    files = sorted(map(str, Path("tests").glob("test_fuzz_*.py")))
    python(session, "-m", "pytest", *files, *session.posargs, FUZZ="10000")


@nox.session
def fuzz_files(session: nox.Session) -> None:
    """Read 2,000 damaged video files; the tests read 100."""
    install(session, "-e", ".[harness,train]", *TEST)
    python(session, "-m", "pytest", "tests/fused/io/test_fuzz_files.py", *session.posargs, FUZZ_FILES="2000")


@nox.session
def lint(session: nox.Session) -> None:
    """Style (ruff), and who may import whom (import-linter)."""
    install(session, *LINT)
    python(session, "-m", "ruff", "check", *session.posargs)
    python(session, "-c", "from importlinter.cli import lint_imports_command as main; main()")


@nox.session
def types(session: nox.Session) -> None:
    """Types (mypy)."""
    install(session, "-e", ".[harness,train]", *TYPES)
    python(session, "-m", "mypy", *session.posargs)


@nox.session
def parity(session: nox.Session) -> None:
    """Judge fused against reference; leaves a run and its report under reports/runs/."""
    install(session, "-e", ".[harness]")
    python(session, "-m", "harness", "parity", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Time everything that passes parity against its rivals; leaves a run and its report under reports/runs/."""
    install(session, "-e", ".[harness]" if not NVIDIA else ".[harness,power]")
    python(session, "-m", "harness", "bench", *session.posargs)


@nox.session
def learn(session: nox.Session) -> None:
    """Train small models on small tasks; leaves a run and its report under reports/runs/."""
    install(session, "-e", ".[harness]")
    python(session, "-m", "harness", "learn", *session.posargs)


@nox.session
def mutants(session: nox.Session) -> None:
    """Plant bugs in a copy of the sources, one at a time, for the tests to find: `nox -s mutants -- --room judge`."""
    install(session, "-e", ".[harness,train]", *TEST)
    python(session, "-m", "harness", "mutants", *session.posargs)


@nox.session
def sanitize(session: nox.Session) -> None:
    """Run the native kernels under CUDA's compute-sanitizer: memory, races, barriers."""
    install(session, "-e", ".[harness]")
    python(session, "-m", "harness", "sanitize", *session.posargs)


@nox.session
def evidence(session: nox.Session) -> None:
    """Make the runs that stand as evidence and are missing for this code; `nox -s evidence -- --dry-run` shows them."""
    install(session, "-e", ".[harness,train]" if not NVIDIA else ".[harness,train,power]", *TEST)
    python(session, "-m", "harness", "evidence", *session.posargs)


@nox.session
def compare(session: nox.Session) -> None:
    """Whether one bench is faster than another: `nox -s compare -- BASE RUN`."""
    install(session, "-e", ".[harness]")
    python(session, "-m", "harness", "compare", *session.posargs)


@nox.session
def report(session: nox.Session) -> None:
    """Write the report of a run again."""
    install(session, "-e", ".[harness]")
    python(session, "-m", "harness", "report", *session.posargs)


@nox.session
def upstream(session: nox.Session) -> None:
    """Build mamba-ssm and causal-conv1d on a CUDA box (half an hour), then judge them beside fused."""
    if not NVIDIA:
        session.error("upstream needs an NVIDIA GPU, with CUDA's nvcc on the PATH; there is no nvidia-smi here")
    flags = {"MAMBA_FORCE_BUILD": "TRUE", "CAUSAL_CONV1D_FORCE_BUILD": "TRUE"}  # else setup.py fetches a wheel or dies
    install(session, "-e", ".[harness]", "setuptools>=61", "wheel", "packaging", "ninja", "einops", "transformers")
    install(session, "--no-build-isolation", "--no-deps", *UPSTREAM, env=flags)  # their own needs clash with torch's
    python(session, "-m", "harness", "parity", *session.posargs)
