"""Energy and clock of a GPU as NVML counts them; nothing where it does not answer."""

from typing import Any


class Power:
    """The counters of one GPU. nvidia-ml-py is optional: without it, or without permission, everything is None."""

    def __init__(self, device: str) -> None:
        self._nvml: Any = None
        if device.startswith("cuda"):
            try:
                import pynvml
                import torch

                pynvml.nvmlInit()
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
                self._nvml = pynvml
            except Exception:  # whatever it is that NVML lacks here, times are measured without it
                self._nvml = None

    def joules(self) -> float | None:
        """Return the energy since the driver was loaded, in joules."""
        return self._ask(lambda nvml: nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) * 1e-3)

    def megahertz(self) -> float | None:
        """Return the clock of the multiprocessors now, in MHz."""
        return self._ask(lambda nvml: float(nvml.nvmlDeviceGetClockInfo(self._handle, nvml.NVML_CLOCK_SM)))

    def _ask(self, question: Any) -> float | None:
        if self._nvml is None:
            return None
        try:
            return float(question(self._nvml))
        except self._nvml.NVMLError:
            return None
