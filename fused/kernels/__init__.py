"""GPU source and its launch, nothing else: plain functions on tensors, no nn.Module, no autograd, no dispatch.

Each file imports its compiler when it is imported itself, so that `fused` works on a box without one; the public
operators import the file at the first call that needs it.
"""
