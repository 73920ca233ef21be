"""Errors that more than one room raises; `from fused import BackendError` is the public name."""


class BackendError(RuntimeError):
    """A backend was asked for that cannot run here; the message says why, and what to do."""
