"""One layer: add to the residual stream and normalise in one step, then mix."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fused.models.videomamba.config import VideoMambaConfig
from fused.models.videomamba.scan_order import Order, orders_of_layer, permute, restore
from fused.modules.mamba import Mamba
from fused.modules.norm import DropPath, Norm
from fused.modules.state import State
from fused.runtime.dtypes import accumulation_dtype


class Block(nn.Module):
    """residual += drop_path(hidden); hidden = mixer(norm(residual)). The first layer's residual is its input."""

    def __init__(self, config: VideoMambaConfig, layer: int, drop_path_rate: float, backend: str = "auto") -> None:
        super().__init__()
        self.fused_add_norm, self.residual_in_fp32 = config.fused_add_norm, config.residual_in_fp32
        self.recompute = config.use_checkpoint and layer < config.checkpoint_num
        self.orders = orders_of_layer(config.scan_order, layer)
        self.norm = Norm(config.embed_dim, config.norm_epsilon, "rms" if config.rms_norm else "layer")
        own = dict(config.ssm_cfg or {})
        self.mixer = Mamba(config.embed_dim, **own, layer_idx=layer, bimamba=config.bimamba, backend=backend)
        self.drop_path = DropPath(drop_path_rate)

    def forward(
        self,
        hidden: Tensor,
        residual: Tensor | None = None,
        order: Order | None = None,
        state: State | None = None,
        return_state: bool = False,
        *,
        backend: str | None = None,
    ) -> tuple[Tensor, Tensor, State | None]:
        """hidden (B, L, D), residual (B, L, D) or None. `order` is the temporal walk; without one, tokens are mixed as
        they come. `backend` is the model's choice for this forward; without one, mixer and norm choose for themselves.
        """
        hidden, residual = self._add_norm(hidden, residual, backend or self.mixer.backend)
        if state is not None or return_state:
            hidden, state = self._mix(hidden, backend, state, True)
            return hidden, residual, state
        if order is None or self.orders == ("spatial",):
            return self._mix(hidden, backend), residual, None
        walked = permute(hidden, order)
        if self.orders == ("temporal",):
            return restore(self._mix(walked, backend), order), residual, None
        # the same weights over both orders: one call of twice the clips keeps a GPU busier than two calls
        stored, walked = self._mix(torch.cat((hidden, walked)), backend).chunk(2)
        return stored + restore(walked, order), residual, None

    def _add_norm(self, hidden: Tensor, residual: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
        """(norm(sum), sum); unfused the sum is rounded first, and the norm's output has its weight's dtype."""
        if residual is not None:
            hidden = self.drop_path(hidden)
        if self.fused_add_norm:
            return self.norm.add(hidden, residual, residual_in_fp32=self.residual_in_fp32, backend=backend)
        residual = hidden if residual is None else residual + hidden
        hidden = self.norm(residual.to(self.norm.weight.dtype), backend)
        if self.residual_in_fp32:
            residual = residual.to(accumulation_dtype(residual.dtype))
        return hidden, residual

    def _mix(self, tokens: Tensor, backend: str | None, *carried: Any) -> Any:
        """The mixer's output; where a state and a word for its return are `carried`, with the new state."""
        if self.recompute and torch.is_grad_enabled():
            # a mixer draws no random numbers, so there is no generator state to stash
            return checkpoint(self.mixer, tokens, *carried, use_reentrant=False, preserve_rng_state=False, backend=backend)
        return self.mixer(tokens, *carried, backend=backend)
