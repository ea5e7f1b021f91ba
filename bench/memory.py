"""Peak memory of a block of code, on a CPU (resident set of the process) or a GPU (allocated bytes)."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

# Freed buffers go back to the system at once, so that the resident set shows what is really in use.
EXACT_MALLOC = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}


class PeakMemory:
    """A context manager whose `extra` is the peak in bytes above the level at entry.

    On a CPU the kernel keeps the high-water mark (VmHWM, Linux only), so no short peak is missed. Start the
    process with the environment `EXACT_MALLOC`.
    """

    def __init__(self, device: str):
        self.cuda = device.startswith("cuda")
        self.extra = 0

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
            self.base = _resident("VmRSS")
        return self

    def __exit__(self, *_) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            self.extra = torch.cuda.max_memory_allocated() - self.base
        else:
            self.extra = _resident("VmHWM") - self.base


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: resident memory is measured on Linux only")
