"""The interfaces of a model, a layer and a mixer that `fused.chunked` can run. They are structural: no class inherits them.

They are imported under TYPE_CHECKING and quoted in annotations: an nn.Module holds parameters and modules in dictionaries, in
which a check of a protocol at run time does not find them.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from fused.modules.norm import DropPath, Norm
from fused.modules.span import Span
from fused.ops.shapes import DirectionWeights


class ChunkableModel(Protocol):
    """A stack of layers over embedded frames; the dropout before the first layer and the drop_path behind the last."""

    requested_backend: str
    cls_token: nn.Parameter
    pos_drop: nn.Dropout
    layers: nn.ModuleList
    drop_path: DropPath

    @property
    def config(self) -> "ChunkableConfig":
        """The sizes of the model."""

    def resolve_backend(self, x: Tensor) -> str:
        """Return the name of the backend that runs where `x` is."""

    def embed_span(self, clip: Tensor, span: Span) -> Tensor:
        """Return tokens with positions (B, L, D) of a clip (B, C, T, H, W) at its place in the video, without dropout."""

    def layer_feature(self, residual: Tensor, backend: str) -> Tensor:
        """Return the feature (B, L, D) of a layer that is not the last, given the residual stream behind it."""

    def last_layer_feature(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """Return the feature (B, L, D) of the last layer, given its output and the residual stream before it."""


class ChunkableConfig(Protocol):
    """The fields of a configuration that are read here; `VideoMambaConfig` explains them."""

    @property
    def num_frames(self) -> int | None: ...
    @property
    def kernel_size(self) -> int: ...
    @property
    def channels(self) -> int: ...
    @property
    def sides(self) -> tuple[int, int]: ...
    @property
    def patches(self) -> int: ...
    @property
    def tubelets(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def scan_order(self) -> str: ...


class ChunkableLayer(Protocol):
    """A layer that adds to the residual stream, normalises, and mixes."""

    norm: Norm
    drop_path: DropPath
    fused_add_norm: bool
    residual_in_fp32: bool

    @property
    def mixer(self) -> "ChunkableMixer":
        """The mixer behind the norm."""


class ChunkableMixer(Protocol):
    """A mixer of in_proj, one or two scans, a gate and out_proj."""

    in_proj: nn.Linear
    out_proj: nn.Linear

    def directions(self) -> Sequence[DirectionWeights]:
        """Return the forward scan's weights, and behind them the backward scan's if the mixer has one."""
