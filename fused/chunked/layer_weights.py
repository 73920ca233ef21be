"""The settings of a layer for a run over chunks, and its parameters cast once for all chunks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fused import backends
from fused.modules.norm import Norm
from fused.modules.wrapped import check_weights, computes_plainly, describe, hooks_of
from fused.ops.shapes import DirectionWeights, Linear
from fused.runtime.autocast import autocast_dtype
from fused.runtime.dtypes import accumulation_dtype

if TYPE_CHECKING:
    from fused.chunked.protocol import ChunkableLayer


@dataclass(frozen=True)
class LayerSpec:
    """The settings of a layer; `sum_dtype` and `residual_dtype` are those of the sum before and after it is stored."""

    chunks: Sequence[slice]  # of tokens, in the order of time
    backend: str
    offload: bool
    kind: str
    eps: float
    fused_add_norm: bool
    matmul_dtype: torch.dtype
    norm_dtype: torch.dtype  # of the norm's result
    residual_dtype: torch.dtype
    sum_dtype: torch.dtype  # at least float32


def layer_spec(
    layer: "ChunkableLayer", parameters: "LayerParameters", hidden: Tensor, residual: Tensor | None, chunks: Sequence[slice],
    backend: str, offload: bool,
) -> LayerSpec:  # fmt: skip
    """Return the spec of a layer for hidden and residual (B, L, D), under the autocast of the caller."""
    fused, weights = layer.fused_add_norm, parameters.in_proj.weight.dtype
    autocast = None if weights == torch.float64 else autocast_dtype(hidden.device)
    summed = hidden.dtype if residual is None else torch.promote_types(hidden.dtype, residual.dtype)
    if residual is not None and fused:
        residual_dtype = residual.dtype
    else:
        residual_dtype = accumulation_dtype(summed) if layer.residual_in_fp32 else summed
    return LayerSpec(
        chunks, backends.operators_of(backend), offload, layer.norm.kind, layer.norm.eps, fused,
        matmul_dtype=autocast or weights,
        norm_dtype=hidden.dtype if fused else parameters.norm.weight.dtype,
        residual_dtype=residual_dtype, sum_dtype=accumulation_dtype(summed),
    )  # fmt: skip


class LayerParameters(NamedTuple):
    """The parameters of a norm, of both projections and of one or two directions."""

    norm: Linear  # both (D,)
    in_proj: Linear
    out_proj: Linear
    directions: tuple[DirectionWeights, ...]  # A is log(-A)

    def flat(self) -> list[Tensor | None]:
        """Return all parameters in order."""
        groups = (self.norm, self.in_proj, self.out_proj, *self.directions)
        return [x for parameters in groups for x in parameters]

    @classmethod
    def of(cls, layer: "ChunkableLayer") -> "LayerParameters":
        """Return the parameters of a layer."""
        mixer = layer.mixer
        norm, in_proj, out_proj = (Linear(x.weight, x.bias) for x in (layer.norm, mixer.in_proj, mixer.out_proj))
        return cls(norm, in_proj, out_proj, tuple(mixer.directions()))

    @classmethod
    def from_flat(cls, flat: Sequence[Any]) -> "LayerParameters":
        """Return the parameters of a list that `flat()` made."""
        values, count = iter(flat), len(DirectionWeights._fields)
        norm, in_proj, out_proj = (Linear(next(values), next(values)) for _ in range(3))
        rest = list(values)
        directions = (DirectionWeights(*rest[i : i + count]) for i in range(0, len(rest), count))
        return cls(norm, in_proj, out_proj, tuple(directions))


def check_unwrapped(layers: Iterable[Any]) -> None:
    """Raise ValueError, naming the module, for a layer with an adapter, a hook or quantised weights.

    A run in chunks reads the weights of a layer. Of its modules it calls `drop_path` only.
    """
    for number, layer in enumerate(layers):
        prefix = f"layers.{number}"
        found = {name: m for name, m in layer.named_modules(prefix=prefix) if hooks_of(m) and m is not layer.drop_path}
        if type(layer.norm).forward is not Norm.forward:
            found[f"{prefix}.norm"] = layer.norm
        if not hasattr(layer.mixer, "directions"):
            found[f"{prefix}.mixer"] = layer.mixer
        for name, module in layer.mixer.named_children():
            if name == "parametrizations":  # of A_log or D: their values are the mixer's attributes
                continue
            if not computes_plainly(module):
                found[f"{prefix}.mixer.{name}"] = module
            check_weights(module, f"{prefix}.mixer.{name}")
        if found:
            name, module = next(iter(found.items()))
            raise ValueError(
                f"{name} {describe(module)}; a run in chunks reads the weights of the layers and does not call their modules: "
                "merge the adapter or remove the hook, or call the model with the whole clip"
            )


class Direction:
    """One direction's weights, A itself, as leaves of the gradients of a chunk."""

    def __init__(self, weights: DirectionWeights) -> None:
        self.weights = weights

    @cached_property
    def packed(self) -> tuple[Tensor, Tensor]:
        """Return the matrices as the native operator packs them, once for all chunks."""
        from fused.ops.mamba_inner.one_direction import pack_matrices

        return pack_matrices(self.weights)

    @property
    def tensors(self) -> list[Tensor]:
        """Return the weights that are not None."""
        return [x for x in self.weights if x is not None]


class LayerWeights:
    """A layer's parameters cast once for all chunks, and the sums of their gradients over chunks."""

    def __init__(self, spec: LayerSpec, parameters: LayerParameters) -> None:
        self._parameters = parameters
        self._sums: dict[int, Tensor] = {}  # by the id of the cast tensor
        norm, in_proj, out_proj, directions = parameters
        self.norm = _detached(norm)
        self.in_proj, self.out_proj = (_detached(x, spec.matmul_dtype) for x in (in_proj, out_proj))
        cast_directions = [Direction(_cast(spec, weights)) for weights in directions]
        self.forward, self.backward = cast_directions[0], cast_directions[1] if len(directions) > 1 else None

    def _cast_parameters(self) -> LayerParameters:
        directions = tuple(x.weights for x in (self.forward, self.backward) if x is not None)
        return LayerParameters(self.norm, self.in_proj, self.out_proj, directions)

    def requires_grad(self) -> "LayerWeights":
        """Make every cast parameter a leaf that requires a gradient; return self."""
        for x in self._cast_parameters().flat():
            if x is not None:
                x.requires_grad_()
        return self

    def add_gradient(self, x: Tensor | None, grad: Tensor) -> None:
        """Add to the gradient of a cast parameter, which is summed in at least float32."""
        if id(x) in self._sums:
            self._sums[id(x)].add_(grad)
        else:
            self._sums[id(x)] = grad.to(accumulation_dtype(grad.dtype), copy=True)

    def gradients(self) -> list[Tensor | None]:
        """Return the gradients of the flat parameters, in their shapes and dtypes."""
        log_A = {id(weights.A) for weights in self._cast_parameters().directions}
        grads: list[Tensor | None] = []
        for parameter, x in zip(self._parameters.flat(), self._cast_parameters().flat(), strict=True):
            total = self._sums.get(id(x))
            if parameter is None or x is None or total is None:
                grads.append(None)
                continue
            total = total * x.detach() if id(x) in log_A else total  # through A = -exp(A_log)
            grads.append(total.view(parameter.shape).to(parameter.dtype))
        return grads


def _detached(linear: Linear, dtype: torch.dtype | None = None) -> Linear:
    detached: Any = (None if x is None else x.detach().to(dtype or x.dtype) for x in linear)
    return Linear(*detached)


def _cast(spec: LayerSpec, weights: DirectionWeights) -> DirectionWeights:
    """Return weights with A itself; matrices are in the dtype of products, A and D in at least float32."""
    detached: Any = (None if x is None else x.detach() for x in weights)
    w = DirectionWeights(*detached)
    A, D = (x.to(accumulation_dtype(x.dtype)) for x in (w.A, w.D))
    return w._replace(
        x_proj=w.x_proj.to(spec.matmul_dtype), dt_proj=w.dt_proj.to(spec.matmul_dtype), A=-A.exp(), D=D
    )  # fmt: skip
