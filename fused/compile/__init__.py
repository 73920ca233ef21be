"""`python -m fused.compile`: fills the caches of compiled kernels before their first use. It needs no GPU."""
