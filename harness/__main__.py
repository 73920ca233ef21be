"""`python -m harness`."""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, when CUDA starts

from harness.cli.app import main  # noqa: E402

if __name__ == "__main__":
    main()
