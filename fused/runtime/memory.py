"""Memory of the CPU that stays with the process between calls."""

import functools

import torch


@functools.cache
def keep_freed_memory() -> None:
    """Let malloc keep up to 62 MiB of freed memory, from the first call on.

    glibc returns memory to the system as soon as twice the largest block that was ever freed lies idle. A layer then gets its
    memory page by page in every call, which takes 1 to 3 us a page. A large block that is freed untouched costs nothing.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")
