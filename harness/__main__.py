"""`python -m harness`."""

import os
import sys

EXTRA = "pip install 'videomamba-bench[harness]'"
NEEDED = ("typer", "rich", "matplotlib", "markdown_it", "pytest_benchmark", "numpy")  # packages that every command imports
UNFIT, INTERRUPTED = 4, 130  # as in harness.runs.conclude, which imports one of them

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
    except SystemExit as ended:
        if ended.code != INTERRUPTED:
            raise
        # The report is written. Python may take an interrupted PyTorch down badly, and a second Ctrl-C would change the code.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(INTERRUPTED)
