"""A CUDA driver that launches nothing and tells what it was asked for."""

import ctypes
from types import SimpleNamespace


class MockDriver:
    """The driver's calls as in cuda-bindings, for one kernel `k` with parameters of these kinds."""

    CUresult = SimpleNamespace(CUDA_ERROR_INVALID_CONTEXT=201)
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_NUM_REGS=4, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED=2)

    class Error(int):
        name = "CUDA_ERROR"

    def __init__(self, kinds=(ctypes.c_uint64, ctypes.c_int64, ctypes.c_float, ctypes.c_uint64)):
        self.kinds = kinds
        self.launches, self.limits, self.contexts, self.results = [], [], ["PyTorch's own"], []

    def __getattr__(self, name):  # all other calls succeed
        if not name.startswith("cu"):
            raise AttributeError(name)
        return lambda *args: (0, name)

    def cuCtxPushCurrent(self, context):
        self.contexts.append(context)
        return (0,)

    def cuCtxPopCurrent(self):
        return 0, self.contexts.pop()

    def cuModuleGetFunction(self, module, name):
        return (0, "function") if name == b"k" else (self.Error(500), None)

    def cuFuncGetParamInfo(self, function, index):
        return (0, 8 * index, ctypes.sizeof(self.kinds[index])) if index < len(self.kinds) else (self.Error(1), 0, 0)

    def cuFuncSetAttribute(self, function, attribute, value):
        self.limits.append(value)
        return (self.Error(1) if value > 232448 else 0,)

    def cuCtxSetCurrent(self, context):
        self.contexts[-1] = context
        return (0,)

    def cuGetErrorString(self, error):
        return 0, b"the driver's message"

    def cuLaunchKernel(self, function, *numbers):
        *shape, stream, pointers, extra = numbers
        addresses = (ctypes.c_void_p * len(self.kinds)).from_address(pointers)
        values = [kind.from_address(address).value for kind, address in zip(self.kinds, addresses, strict=True)]
        self.launches.append((shape, stream, values))
        return (self.results.pop() if self.results else 0,)
