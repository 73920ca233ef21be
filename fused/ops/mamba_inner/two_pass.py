"""Both directions of a mixer over a video in chunks, in two passes over the chunks. The first makes states only.

    right to left:   the states that enter every split of the backward scan; not over the first chunk, which comes last
    left to right:   the states that enter the splits of the forward scan; then both scans at once, as over a whole clip

So each scan runs once: with split-L, the state-only passes are needed anyway. A chunk is not split where its batch fills the
GPU by itself; `TwoPassMixer.pays` then returns False. Nothing here has gradients or is traced.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused.ops.mamba_inner.kernels import PackedWeights
from fused.ops.mamba_inner.pipeline import Pipeline, pack
from fused.ops.selective_scan import launch as scan
from fused.ops.selective_scan import schedule
from fused.ops.selective_scan.inputs import ScanInputs, aligned_or_none
from fused.ops.selective_scan.launch import schedule_for
from fused.ops.shapes import DirectionWeights
from fused.runtime.modes import is_batch_invariant


class BackwardStates(NamedTuple):
    """The states from which the backward scan of a chunk starts: None at the end of the video, or where unknown."""

    conv_state: Tensor | None  # (B, E, K-1) in the stream's dtype
    ssm_state: Tensor | None  # (B, E, N) float32
    split_initial_states: Tensor | None  # (1, B, splits, E, N) float32


END_OF_VIDEO = BackwardStates(None, None, None)


class TwoPassMixer:
    """A mixer's two directions, A itself and not its logarithm; weights are packed once for all chunks."""

    def __init__(self, directions: Sequence[DirectionWeights]) -> None:
        self._directions = list(directions)
        self._packed: PackedWeights | None = None

    def pays(self, clips: int, tokens: int, device: torch.device) -> bool:
        """Return whether the scan over a chunk of `tokens` tokens is split, which needs a state-only pass anyway."""
        if not clips:
            return False
        E, N = self._directions[0].A.shape
        processors = schedule.multiprocessors(device)
        plan = schedule.make_schedule(clips, tokens, E, N, 2, processors, batch_invariant=is_batch_invariant())
        return plan.fwd_schedule.num_splits > 1

    def backward_states(self, x: Tensor, entering: BackwardStates) -> tuple[BackwardStates, BackwardStates]:
        """Run the backward direction over x (B, L, E) for its states only.

        Returns `entering` with the states of its splits, and the states that enter the previous chunk.
        """
        p = Pipeline(x, None, self._directions[1:], (True,), is_batch_invariant(), A_is_log=False)
        s, conv_states = self._scan_inputs(p, (entering.conv_state,))
        splits = schedule_for(x, p.N, 2, is_batch_invariant()).fwd_schedule
        states, final_states = scan.state_pass(s, aligned_or_none(entering.ssm_state), p.schedule, splits)
        return entering._replace(split_initial_states=states), BackwardStates(conv_states[0], final_states[0], None)

    def run(
        self, xz: Tensor, state: Sequence[Tensor] | None, entering: BackwardStates
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return gated y (B, L, E) of both directions over xz (B, L, 2E), and the state that leaves the forward one."""
        conv_state, ssm_state = state or (None, None)
        x, z = xz.chunk(2, dim=-1)
        p = Pipeline(x, z, self._directions, (False, True), is_batch_invariant(), A_is_log=False)
        s, conv_states = self._scan_inputs(p, (conv_state, entering.conv_state))
        if entering.split_initial_states is None:
            states = [s.A[0].new_zeros(len(x), *s.A[0].shape) if e is None else e for e in (ssm_state, entering.ssm_state)]
            r = scan.forward(s, torch.stack(states), p.schedule, keep=False)
            return r.y, (conv_states[0], r.final_states[0])
        splits = p.schedule.fwd_schedule
        one_direction = schedule_for(x, p.N, 1, is_batch_invariant())
        first, _ = scan.state_pass(s.forward_direction, aligned_or_none(ssm_state), one_direction, splits)
        second = entering.split_initial_states
        unsplit = torch.cat((first[:, :, 0], second[:, :, -1])) if splits.num_unsplit else None  # states of unsplit sequences
        r = scan.forward(s, unsplit, p.schedule, keep=False, split_initial_states=torch.cat((first, second)))
        return r.y, (conv_states[0], r.final_states[0])

    def _scan_inputs(self, p: Pipeline, conv_states: Sequence[Tensor | None]) -> tuple[ScanInputs, tuple[Tensor, ...]]:
        """Return the scan inputs of all of the pipeline's directions, and the conv states (B, E, K-1) that leave."""
        if self._packed is None:
            self._packed = pack(*zip(*self._directions, strict=True), dtype=self._directions[0].x_proj.dtype)
        c, leaving = p.convolve(conv_states, want_states=True)
        assert leaving is not None
        packed = self._packed.last(len(conv_states))
        return p.scan_inputs(c, *p.project(c, packed), packed), leaving
