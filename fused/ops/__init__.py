"""The operators, a folder each: public function, PyTorch version, kernels, launch and registration.

A folder holds `api.py` (the public function: checks, docstring, choice of backend), `eager.py` (PyTorch on any device),
`native.py` and `cpu.py` (registration and gradients of the kernels for GPUs and CPUs), `launch.py`, `schedule.py` and the
kernels themselves, as far as the operator has them.
"""
