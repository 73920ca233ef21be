"""Operators in other packages' layouts, brought to this project's signature.

A subject names those that it offers in LAYOUTS, for `--with SUBJECT:NAME=module:callable@LAYOUT`.
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

Operator = Callable[..., tuple[Tensor, Tensor]]


def scan_from_mamba_ssm(theirs: Callable[..., Any]) -> Operator:
    """Return `selective_scan` by mamba-ssm's `selective_scan_fn(u (B,E,L), delta, A, B (B,G,N,L), C, D, z, delta_bias,
    delta_softplus, return_last_state)`; it raises NotImplementedError for an initial state or the reverse direction."""

    def selective_scan(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
        delta_bias: Tensor | None = None, *, softplus: bool = True, initial_state: Tensor | None = None, reverse: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if initial_state is not None or reverse:
            raise NotImplementedError("mamba-ssm's layout has no initial state and no reverse")
        states = [(t if t.dim() == 4 else t.unsqueeze(2)).permute(0, 2, 3, 1).contiguous() for t in (B, C)]
        channels_first = [None if t is None else t.transpose(1, 2).contiguous() for t in (u, delta, z)]
        y, last = theirs(channels_first[0], channels_first[1], A, *states, D, channels_first[2], delta_bias, softplus, True)
        return y.transpose(1, 2), last

    return selective_scan


def conv_from_mamba_ssm(theirs: Callable[..., Any]) -> Operator:
    """Return `causal_conv1d` by causal-conv1d's `causal_conv1d_fn(x (B,E,L), weight, bias, activation=)`, its final state by
    slicing; it raises NotImplementedError for an initial state or the reverse direction."""

    def causal_conv1d(
        x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = "silu",
        initial_state: Tensor | None = None, reverse: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if initial_state is not None or reverse:
            raise NotImplementedError("causal-conv1d's layout has no initial state here and no reverse")
        channels_first = x.transpose(1, 2).contiguous()
        num_state = weight.shape[1] - 1
        final = F.pad(channels_first, (num_state, 0))[..., channels_first.shape[2] :]
        return theirs(channels_first, weight, bias, activation=activation).transpose(1, 2), final

    return causal_conv1d
