"""The causal convolution by kernels of this project, as the operator `videomamba::causal_conv1d`."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fused.ops.causal_conv1d import launch
from fused.runtime.checks import check_native_dtypes
from fused.runtime.library import register


def causal_conv1d_native(
    x: Float[Tensor, "B L E"],
    weight: Float[Tensor, "E K"],
    bias: Float[Tensor, " E"] | None = None,
    *,
    activation: str | None = "silu",
    initial_state: Float[Tensor, "B E S"] | None = None,
    reverse: bool = False,
    seq_idx: Int[Tensor, "B L"] | None = None,
) -> tuple[Float[Tensor, "B L E"], Float[Tensor, "B E S"]]:
    """Convolve as `fused.causal_conv1d` says.

    Raises ValueError for a width K of more than 8, and for a tensor in float64.
    """
    if weight.shape[1] > launch.MAX_WIDTH:
        raise ValueError(
            f"causal_conv1d: backend 'native' has K of 1 to {launch.MAX_WIDTH}, got weight of shape {tuple(weight.shape)}; "
            "use backend='torch'"
        )
    check_native_dtypes("causal_conv1d", x=x, weight=weight, bias=bias, initial_state=initial_state)
    seq_idx = None if seq_idx is None else seq_idx.contiguous()
    return _causal_conv1d(x, weight, bias, initial_state, seq_idx, activation is not None, reverse)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, seq_idx: Tensor | None, silu: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return y (B, L, E) and the final state (B, E, K-1) of x (B, L, E), weight (E, K) and bias (E,)."""
    y, finals = launch.forward(x, (weight,), (bias,), (initial_state,), (reverse,), silu, seq_idx=seq_idx)
    (final,) = finals or ()
    return y[0], final


def _forward_shapes(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, seq_idx: Tensor | None, silu: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), x.new_empty((x.shape[0], x.shape[2], weight.shape[1] - 1))


def _backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, seq_idx: Tensor | None, silu: bool,
    reverse: bool, dy: Tensor | None, dstate: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Return dx (B, L, E), dweight (E, K), dbias (E,) and dinitial_state (B, E, K-1), the last two None for None."""
    dy = torch.zeros_like(x) if dy is None else dy
    g = launch.backward((dy,), (dstate,), x, (weight,), (bias,), (initial_state,), (reverse,), silu, seq_idx=seq_idx)
    return g.x, g.weights[0], g.biases[0], g.initial_states[0]


def _backward_shapes(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, seq_idx: Tensor | None, silu: bool,
    reverse: bool, dy: Tensor | None, dstate: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dbias, dinitial_state = (x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (bias, initial_state))
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias, dinitial_state


_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? seq_idx, bool silu, bool reverse"
_causal_conv1d_backward = register(
    f"causal_conv1d_backward({_INPUTS}, Tensor? dy, Tensor? dstate) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_state)",
    _backward,
    _backward_shapes,
)
_causal_conv1d = register(
    f"causal_conv1d({_INPUTS}) -> (Tensor y, Tensor final_state)",
    _forward,
    _forward_shapes,
    _causal_conv1d_backward,
)
