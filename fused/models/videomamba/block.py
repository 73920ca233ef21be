"""One layer: add to the residual stream and normalise in one step, then run the mixer."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fused.models.videomamba.config import VideoMambaConfig
from fused.models.videomamba.scan_order import Order, orders_of_layer, permute, restore
from fused.modules.mamba import Mamba
from fused.modules.norm import DropPath, Norm
from fused.modules.residual import pre_norm
from fused.modules.state import State
from fused.modules.wrapped import is_untouched


class Block(nn.Module):
    """One layer: residual += drop_path(hidden); hidden = mixer(norm(residual)). The first layer's residual is its input."""

    def __init__(self, config: VideoMambaConfig, layer: int, drop_path_rate: float, backend: str = "auto") -> None:
        super().__init__()
        self.fused_add_norm, self.residual_in_fp32 = config.fused_add_norm, config.residual_in_fp32
        self.recompute = config.use_checkpoint and layer < config.checkpoint_num
        self.orders = orders_of_layer(config.scan_order, layer)
        self.norm = Norm(config.embed_dim, config.norm_epsilon, "rms" if config.rms_norm else "layer")
        options = dict(config.ssm_cfg or {})
        self.mixer = Mamba(config.embed_dim, **options, layer_idx=layer, bimamba=config.bimamba, backend=backend)
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
        """Return the mixer's output (B, L, D), the residual stream (B, L, D), and the new state or None.

        hidden is (B, L, D), residual (B, L, D) or None for the first layer. `order` is the temporal order of the tokens;
        without it they are scanned as given. `backend` is a concrete name that the model has resolved for this forward;
        without it the block resolves its mixer's.
        """
        backend = backend or self.mixer.resolve_backend(hidden)
        hidden, residual = pre_norm(
            self.norm, hidden, residual, fused_add_norm=self.fused_add_norm, residual_in_fp32=self.residual_in_fp32,
            backend=backend, drop_path=self.drop_path if self.training else None,
        )  # fmt: skip
        if state is not None or return_state:
            hidden, state = self._run_mixer(hidden, backend, state, True)
            return hidden, residual, state
        if order is None or self.orders == ("spatial",):
            return self._run_mixer(hidden, backend), residual, None
        temporal = permute(hidden, order)
        if self.orders == ("temporal",):
            return restore(self._run_mixer(temporal, backend), order), residual, None
        # the same weights over both orders: one call of twice the clips keeps a GPU busier than two calls
        spatial, temporal = self._run_mixer(torch.cat((hidden, temporal)), backend).unflatten(0, (2, -1)).unbind()
        return spatial + restore(temporal, order), residual, None

    def _run_mixer(self, tokens: Tensor, backend: str, *state_and_return_state: Any) -> Any:
        """Return the mixer's output (B, L, D), with the new state if `state_and_return_state` asks for it."""
        arguments = (tokens, *state_and_return_state)
        if self.recompute and torch.is_grad_enabled():
            # a mixer draws no random numbers, so there is no generator state to store; a wrapper of its modules may draw some
            draws = not is_untouched(self.mixer, Mamba)
            return checkpoint(self.mixer, *arguments, use_reentrant=False, preserve_rng_state=draws, backend=backend)
        return self.mixer(*arguments, backend=backend)
