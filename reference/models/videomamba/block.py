"""One layer of VideoMamba: add to the residual stream, normalise, mix."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reference.models.videomamba.config import VideoMambaConfig
from reference.models.videomamba.scan_order import orders_of_layer, undo, walk
from reference.modules.mamba import Mamba
from reference.modules.norm import DropPath, Norm
from reference.modules.state import State
from reference.ops.dtypes import accumulation_dtype


class Block(nn.Module):
    """residual += drop_path(hidden); hidden = mixer(norm(residual)). The first layer's residual is its input.

    With `fused_add_norm=False` the sum is rounded to the residual's dtype before it is normalised, and the normalised value
    has the dtype of the norm's weight; in float32 both ways give the same numbers.
    """

    def __init__(self, config: VideoMambaConfig, layer: int, drop_path_rate: float) -> None:
        super().__init__()
        self.fused_add_norm, self.residual_in_fp32 = config.fused_add_norm, config.residual_in_fp32
        self.recompute = config.use_checkpoint and layer < config.checkpoint_num
        self.orders = orders_of_layer(config.scan_order, layer)
        self.norm = Norm(config.embed_dim, config.norm_epsilon, "rms" if config.rms_norm else "layer")
        self.mixer = Mamba(config.embed_dim, **dict(config.ssm_cfg or {}), layer_idx=layer, bimamba=config.bimamba)
        self.drop_path = DropPath(drop_path_rate)

    def forward(
        self, hidden: Tensor, residual: Tensor | None = None, order: Tensor | None = None,
        state: State | None = None, return_state: bool = False,
    ) -> tuple[Tensor, Tensor, State | None]:  # fmt: skip
        """hidden (B, L, D), residual (B, L, D) or None; `order` is the temporal walk, for layers that use it."""
        hidden, residual = self.add_norm(hidden, residual)
        if state is not None or return_state:
            hidden, state = self._mixed(hidden, state, True)
            return hidden, residual, state
        mixed = [self.mix(hidden, order if name == "temporal" else None) for name in self.orders]
        return sum(mixed[1:], start=mixed[0]), residual, None

    def add_norm(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the mixer reads, and the residual stream with `hidden` in it."""
        if residual is not None:
            hidden = self.drop_path(hidden)
        if self.fused_add_norm:
            hidden, residual = self.norm.add(hidden, residual, residual_in_fp32=self.residual_in_fp32)
        else:
            residual = hidden if residual is None else residual + hidden
            hidden = self.norm(residual.to(self.norm.weight.dtype))
            if self.residual_in_fp32:
                residual = residual.to(accumulation_dtype(residual.dtype))
        return hidden, residual

    def mix(self, hidden: Tensor, order: Tensor | None) -> Tensor:
        """The mixer over tokens in the given order, its output back in storage order."""
        return self._mixed(hidden) if order is None else undo(self._mixed(walk(hidden, order)), order)

    def _mixed(self, *arguments: Any) -> Any:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.mixer, *arguments, use_reentrant=False)
        return self.mixer(*arguments)
