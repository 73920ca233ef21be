"""Backend `native`: the kernels of `fused.kernels` as operators that PyTorch knows, with gradients.

Each is registered in the library `videomamba` with what `torch.compile` must know of its results, and is opaque to it:
forward and backward are one operator each. Streams (u, delta, z, B, C) are read in place through their strides.
"""
