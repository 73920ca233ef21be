"""The short causal convolution before the scan: every channel by itself, over the K newest tokens.

    y_t = act(bias + sum_w weight[:, w] * x_{t - (K-1-w)})        reverse: x_{t + (K-1-w)}

The state is the K-1 raw inputs beyond the edge of the sequence, in time order: those before token 0, or, with
`reverse`, those after token L-1; zeros where nothing was. The final state is the next call's initial state.
"""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from fused import backends
from fused.backends import CPU, NATIVE, TORCH, Abilities
from fused.ops import mamba_ssm
from fused.ops.causal_conv1d.cpu import causal_conv1d_cpu
from fused.ops.causal_conv1d.eager import causal_conv1d_eager
from fused.ops.causal_conv1d.packed import causal_conv1d_packed
from fused.ops.seq_idx import check_seq_idx
from fused.runtime.checks import check_choice, check_tensor
from fused.runtime.dtypes import KERNEL_DTYPES

ACTIVATIONS = ("silu", "swish", None)
BACKENDS = {
    "native": NATIVE,
    "cpu": CPU,
    "mamba_ssm": Abilities(False, True, True, False, KERNEL_DTYPES, ("cuda",)),
    "torch": TORCH,
}
"""Abilities of the backends that have this operator."""


def causal_conv1d(
    x: Float[Tensor, "B L E"],
    weight: Float[Tensor, "E K"],
    bias: Float[Tensor, " E"] | None = None,
    *,
    activation: str | None = "silu",
    initial_state: Float[Tensor, "B E S"] | None = None,
    reverse: bool = False,
    seq_idx: Int[Tensor, "B L"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B L E"], Float[Tensor, "B E S"]]:
    """Convolve x along its tokens and return (y, final_state), both in x's dtype; the states are (B, E, K-1).

    `activation` is "silu" (also called "swish") or None. Computes in at least float32 and rounds once; gradients reach
    x, weight, bias and initial_state and flow from both results.

    `seq_idx` numbers the segments of each row, ascending: inputs of another segment than the token's count as zero, in
    `final_state` those of another than the last token's (reverse: the first's). `initial_state` continues the first segment
    (reverse: the last). Backend "mamba_ssm" does not take `seq_idx`.

    Raises TypeError or ValueError for an argument that does not fit, ValueError for what the backend cannot do,
    BackendError for a backend that cannot run here.

        >>> x, weight = torch.randn(2, 63, 8), torch.randn(8, 4)
        >>> y, state = causal_conv1d(x, weight)
    """
    _check(x, weight, bias, activation, initial_state)
    asked = {"initial_state": initial_state is not None, "reverse": reverse}
    backends.check_abilities("causal_conv1d", BACKENDS, backend, x.dtype, asked)
    backend = backends.choose(backend, x.device)
    if seq_idx is not None:
        check_seq_idx("causal_conv1d", seq_idx, x.shape[0], x.shape[1], x.device)
        if backends.operators_of(backend) == "mamba_ssm":
            raise ValueError(f"causal_conv1d: backend {backend!r} does not support seq_idx; use backend='torch'")
    options: dict[str, Any] = {} if seq_idx is None else {"seq_idx": seq_idx}
    run = implementation(backend, seq_idx is not None)
    return run(x, weight, bias, activation=activation, initial_state=initial_state, reverse=reverse, **options)


def implementation(backend: str, packed: bool = False) -> Callable[..., Any]:
    """Return the operator of a concrete backend, without argument checks; its arguments are those above but for `backend`.

    It takes `seq_idx` only with `packed`, which "mamba_ssm" does not have.
    """
    operator_backend = backends.operators_of(backend)
    if operator_backend == "native":
        from fused.ops.causal_conv1d.native import causal_conv1d_native  # Triton is imported where it is used

        return causal_conv1d_native
    if packed:
        return causal_conv1d_packed
    if operator_backend == "cpu":
        return causal_conv1d_cpu
    return mamba_ssm.causal_conv1d if operator_backend == "mamba_ssm" else causal_conv1d_eager


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, initial_state: Tensor | None) -> None:
    op = "causal_conv1d"
    check_tensor(op, "x", x, "B L E", {}, None)
    sizes = dict(zip("BLE", x.shape, strict=True))
    check_tensor(op, "weight", weight, "E K", sizes, x.device)
    if weight.shape[1] < 1:
        raise ValueError(f"{op}: weight must have K of at least 1, got shape {tuple(weight.shape)}")
    sizes["K-1"] = weight.shape[1] - 1
    if bias is not None:
        check_tensor(op, "bias", bias, "E", sizes, x.device)
    if initial_state is not None:
        check_tensor(op, "initial_state", initial_state, "B E K-1", sizes, x.device)
    check_choice(op, "activation", activation, ACTIVATIONS)
