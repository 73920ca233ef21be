"""Errors that more than one package of `fused` raises; `from fused import BackendError` is the public name."""


class BackendError(RuntimeError):
    """The error for a backend that cannot run here; the message says why, and what to do."""
