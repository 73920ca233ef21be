"""Memory: what is free, and what of the CPU's stays with the process between calls."""

import functools
import os
from pathlib import Path

import torch

MEMORY = Path("/proc/meminfo")


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a device in bytes, None where it is not known.

    On a CPU it is what the system can give without swapping, files that it caches included.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    try:
        fields = dict(line.split(":", 1) for line in MEMORY.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not on this system
        return None


@functools.cache
def keep_freed_memory() -> None:
    """Let malloc keep up to 62 MiB of freed memory, from the first call on.

    glibc returns memory to the system as soon as twice the largest block that was ever freed lies idle. A layer then gets its
    memory page by page in every call, which takes 1 to 3 us a page. A large block that is freed untouched costs nothing.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")
