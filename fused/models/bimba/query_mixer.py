"""A Mamba mixer whose output is read at query rows only."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fused import backends
from fused.models.bimba.interleave import Places
from fused.modules.mamba import Mamba
from fused.modules.wrapped import modules_to_call
from fused.ops.mamba_inner.eager import one_direction_eager
from fused.ops.shapes import Linear
from fused.runtime.autocast import autocast_dtype
from fused.runtime.dtypes import accumulation_dtype

_LINEAR, _INNER = ("in_proj", "out_proj"), ("conv1d", "x_proj", "dt_proj")


def mix_at_queries(
    mixer: Mamba, sequence: Float[Tensor, "B N C"], queries: Float[Tensor, "B Q C"], places: Places, backend: str
) -> Float[Tensor, "B Q C"]:
    """Return mixer(sequence) (B, N, C) at the query rows (B, Q, C), of which `queries` (B, Q, C) is a copy.

    The gate, out_proj and the scan's outputs are computed at query rows only: by one operator on "native", one after another on
    "torch" and "cpu". On "mamba_ssm", which cannot do this, and where modules of the mixer have to be called, the whole mixer
    runs.
    """
    called = called_modules(mixer)
    operators = backends.operators_of(backend)
    if called or operators == "mamba_ssm":
        return mixer(sequence, backend=backend).index_select(1, places.queries)
    if operators == "native":
        return mix_native(mixer, sequence, queries, places)
    return mix_eager(mixer, sequence, queries, places, operators)


def called_modules(mixer: Mamba) -> tuple[str, ...]:
    """Return the names of the mixer's modules that have to be called, since they are more than their weight."""
    inner = (*_INNER, *(name + "_b" for name in _INNER)) if mixer.bimamba else _INNER
    return modules_to_call(mixer._modules, (*_LINEAR, *inner), mixer.layer_idx)


def mix_native(mixer: Mamba, sequence: Tensor, queries: Tensor, places: Places) -> Tensor:
    """Run the operator of `ops/mamba_inner/query_rows.py`."""
    from fused.ops.mamba_inner.query_rows import mamba_inner_query_rows

    in_proj, out_proj, dtype = mixer.in_proj, mixer.out_proj, autocast_dtype(sequence.device)
    if dtype is None and sequence.dtype != in_proj.weight.dtype:
        return mixer(sequence, backend="native").index_select(1, places.queries)  # raises the error of Linear
    return mamba_inner_query_rows(
        sequence, queries, places.tile_queries, Linear(in_proj.weight, in_proj.bias), mixer.directions(squeeze=False),
        Linear(out_proj.weight, out_proj.bias), dtype=dtype or sequence.dtype,
    )  # fmt: skip


def mix_eager(mixer: Mamba, sequence: Tensor, queries: Tensor, places: Places, operators: str) -> Tensor:
    """Run the operators of "torch" or "cpu": each scan over all tokens, without its gate, and the rest on query rows."""
    weight_x, weight_z = mixer.in_proj.weight.chunk(2)
    x, z = F.linear(sequence, weight_x), F.linear(queries, weight_z)  # BIMBA's in_proj has no bias
    y = None
    for i, weights in enumerate(mixer.directions()):
        A = -weights.A.to(accumulation_dtype(weights.A.dtype)).exp()
        one, _ = one_direction_eager(x, weights._replace(A=A), reverse=i == 1, backend=operators)
        rows = one.index_select(1, places.queries)
        y = rows if y is None else y + rows
    assert y is not None
    precise = accumulation_dtype(y.dtype)
    return mixer.out_proj((y.to(precise) * F.silu(z.to(precise))).to(y.dtype))
