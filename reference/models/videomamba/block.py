"""One layer of VideoMamba: add to the residual stream, normalise, mix tokens."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reference.models.videomamba.config import VideoMambaConfig
from reference.models.videomamba.scan_order import orders_of_layer, permute, restore
from reference.modules.mamba import Mamba
from reference.modules.norm import DropPath, Norm
from reference.modules.state import State


class Block(nn.Module):
    """One layer, on two tensors (B, L, D): the last mixer's output `hidden` and the residual stream.

        residual = residual + drop_path(hidden)     in the first layer: hidden, which then is the embedded tokens
        hidden   = mixer(norm(residual))

    `Norm.add` is the rule of the sum and its rounding, with and without `fused_add_norm`.
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
        """Return (new hidden, new residual, new state or None); hidden and residual are (B, L, D), residual None at first.

        `order` is the temporal order, for the layers that use it. A state needs a causal mixer and spatial order.
        """
        normed, residual = self.add_norm(hidden, residual)
        if state is not None or return_state:
            hidden, state = self._run_mixer(normed, state, True)
            return hidden, residual, state
        outputs = [self._run_mixer_in_order(normed, order if name == "temporal" else None) for name in self.orders]
        return sum(outputs[1:], start=outputs[0]), residual, None

    def add_norm(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the mixer's input and the new residual stream, both (B, L, D)."""
        if residual is not None:
            hidden = self.drop_path(hidden)
        return self.norm.add(
            hidden, residual, fused_add_norm=self.fused_add_norm, residual_in_fp32=self.residual_in_fp32
        )  # fmt: skip

    def _run_mixer_in_order(self, tokens: Tensor, order: Tensor | None) -> Tensor:
        """Run the mixer over tokens (B, L, D) reordered by `order` and return its output in storage order."""
        if order is None:
            return self._run_mixer(tokens)
        return restore(self._run_mixer(permute(tokens, order)), order)

    def _run_mixer(self, *arguments: Any) -> Any:
        """Call the mixer; with `recompute` its activations are computed again in the backward."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.mixer, *arguments, use_reentrant=False)
        return self.mixer(*arguments)
