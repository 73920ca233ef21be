"""`python -m harness`."""

import os
import signal
import sys

EXTRA = "pip install 'videomamba-bench[harness]'"
NEEDED = ("typer", "rich", "matplotlib", "markdown_it", "pytest_benchmark", "numpy")  # packages that every command imports
UNFIT = 4  # harness.runs.conclude.UNFIT, which imports one of them

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, when CUDA starts

try:
    from harness.cli.app import main
except ModuleNotFoundError as error:
    missing = (error.name or "").partition(".")[0]
    if missing not in NEEDED:
        raise
    print(f"error: python -m harness needs {missing}, which is not installed: {EXTRA}", file=sys.stderr)
    sys.exit(UNFIT)

if __name__ == "__main__":
    try:
        main()
    finally:  # all is said and written; a further signal, while Python takes PyTorch down, must not change the exit code
        for which in (signal.SIGINT, signal.SIGTERM):
            signal.signal(which, signal.SIG_IGN)
