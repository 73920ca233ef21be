"""A causal model run frame by frame at low latency: on a GPU each frame is one replay of a CUDA graph.

    stream = FrameStream(model, total=10_000)
    for frame in camera:  # (B, C, H, W), or (C, H, W) as `fused.io.video.read_frames` yields them
        logits = stream(frame)

The time and the memory of a frame do not depend on the number of frames before it.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fused.models.videomamba.embedding import temporal_positions
from fused.models.videomamba.model import VideoMamba
from fused.models.videomamba.streaming import continuation
from fused.modules.span import Span
from fused.modules.state import States
from fused.runtime.autocast import autocast_of_graph
from fused.runtime.graphs import CudaRecorder, Recorder, Recording, warm


class FrameStream:
    """A causal `VideoMamba` in eval mode, with the state of `batch_size` videos, which is written in place.

    Outputs are those of `model(frame, ssm_state=..., return_state=True, temporal_pos_offset=...)`, without gradients. The
    temporal table holds the model's `num_frames`. For a longer video `total` is its length in tubelets (frames, if
    kernel_size is 1), and the table is stretched to it.

    `graph` says whether to replay a CUDA graph; None means on CUDA. The constructor records the graph, under the autocast
    that is on at that time. The graph reads the parameters at the addresses that they have at that time: call `reset` after
    loading new values into them; moving or replacing them has no effect on the graph. The first frame of a video, which
    comes with CLS, runs without the graph.

    Raises TypeError for another kind of model; ValueError for a model in training mode, without memory or not causal, for
    graph=True off CUDA, and for a `batch_size` or `total` that is no positive integer; BackendError for a backend that
    cannot run.
    """

    def __init__(self, model: VideoMamba, batch_size: int = 1, total: int | None = None, *, graph: bool | None = None) -> None:
        _check_model(model)
        if total is not None and (not isinstance(total, int) or isinstance(total, bool) or total < 1):
            raise ValueError(f"total is {total!r}; allowed: the tubelets of the whole video, from 1 up, or None")
        config, device = model.config, model.cls_token.device
        self.model, self.total = model, config.tubelets if total is None else total
        self._tubelets = 0
        self._autocast = autocast_of_graph(device)
        with torch.inference_mode(False), torch.no_grad():
            state = model.init_state(batch_size)
            model.unpack_states(model.cls_token.dtype, state[: config.depth], True)  # raises for an order without states
            model.resolve_backend(model.cls_token)
            self._states, self._means = state[: config.depth], state[config.depth :]
            self._frame = model.cls_token.new_zeros(batch_size, config.channels, config.kernel_size, *config.sides)
            self._temporal_table = self._positions()
            self._temporal_row = torch.empty_like(self._temporal_table[:1])
            self._parameters = [p.detach() for p in model.parameters()]  # the graph reads this memory
            self._recording = self._record(CudaRecorder(device)) if self._takes_graph(graph, device) else None
        self.reset()

    @property
    def frames(self) -> int:
        """The number of frames since the last `reset`."""
        return self._tubelets * self.model.config.kernel_size

    def reset(self) -> None:
        """Begin another video: set the states to zero."""
        self._tubelets = 0
        with torch.inference_mode(False), torch.no_grad():
            self._temporal_table.copy_(self._positions())
            for x in (x for pair in (*self._states, *self._means) for x in pair):
                x.zero_()

    def __call__(self, frame: Tensor) -> Any:
        """Return the output after the next frame (B, C, H, W) or tubelet (B, C, kernel_size, H, W).

        With batch_size 1 it may lack B, as the frames of `fused.io.video.read_frames` do. It is on any device, in the
        parameters' dtype. The output, a tensor or a `DistillOutput`, is the caller's: later frames do not write into it.

        Raises ValueError for another shape and for a frame past the video's end, TypeError for another dtype.
        """
        frame = self._checked(frame)
        with torch.inference_mode(False), torch.no_grad():
            self._frame.copy_(frame)
            self._temporal_row.copy_(self._temporal_table[self._tubelets : self._tubelets + 1])
            if self._tubelets == 0 or self._recording is None:
                output = self._advance(int(self._tubelets == 0))
            else:
                self._recording.replay()
                output = self._recording.output
                output = output.clone() if isinstance(output, Tensor) else type(output)(*map(torch.clone, output))
        self._tubelets += 1
        return output

    def _checked(self, frame: Tensor) -> Tensor:
        """Return the frame as a tubelet (B, C, kernel_size, H, W); raise ValueError or TypeError for one that does not fit."""
        if self.model.training:
            raise ValueError("model is in training mode; allowed: eval mode, after model.eval()")
        if self._tubelets == self.total:
            raise ValueError(
                f"the video's {self.total} tubelets have all been seen; for a longer one pass their number as total: the "
                "temporal table is stretched to it. reset() begins another video"
            )
        wanted = tuple(self._frame.shape)
        shapes = [wanted] if wanted[2] > 1 else [wanted[:2] + wanted[3:], wanted]
        shapes += [shape[1:] for shape in shapes if wanted[0] == 1]
        if not isinstance(frame, Tensor) or tuple(frame.shape) not in shapes:
            found = tuple(frame.shape) if isinstance(frame, Tensor) else type(frame).__name__
            raise ValueError(f"frame is {found}; allowed: {' or '.join(map(str, shapes))}")
        if frame.dtype != self._frame.dtype:
            raise TypeError(f"frame is {frame.dtype}; allowed: {self._frame.dtype}, as the model's parameters")
        return frame.reshape(wanted)

    def _positions(self) -> Float[Tensor, "N D"]:
        """Return the temporal positions of all tubelets: one row each, so that no frame has to stretch the table."""
        return temporal_positions(self.model.temporal_pos_embedding.detach(), Span(0, self.total, self.total)).clone()

    def _advance(self, cls: int) -> Any:
        """Return the output for the frame and the position in the buffers, and write the new states over the old ones.

        `cls` is 1 if CLS goes before the frame. The graph holds this function: it reads and writes buffers at fixed
        addresses, and no branch depends on their values.
        """
        model, mean = self.model, next(iter(self._means), None)
        with self._autocast():
            tokens = model.embed_tubelets(self._frame, self._temporal_row, cls)
            output, states, new_mean = model.forward_tokens(tokens, cls, self._states, mean, True)
        _copy_states(self._states, states)
        if mean is not None:
            _copy_states([mean], [new_mean])
        return output

    @staticmethod
    def _takes_graph(wanted: bool | None, device: torch.device) -> bool:
        """Return whether to record a graph; raise ValueError if it is wanted off CUDA."""
        if wanted and device.type != "cuda":
            raise ValueError(f"graph is True, but the model is on {device}; a CUDA graph needs it on a CUDA device")
        return device.type == "cuda" if wanted is None else wanted

    def _record(self, recorder: Recorder) -> Recording:
        """Return the recording of a frame that is not the first."""
        with recorder.warming():
            self._advance(1)
        warm(recorder, lambda: self._advance(0))
        return recorder.record(lambda: self._advance(0))


def _copy_states(target: States, source: Any) -> None:
    """Copy states into states: the first tensors of all pairs in one call, the second in another. Each kind has one dtype."""
    for old, new in zip(zip(*target, strict=True), zip(*source, strict=True), strict=True):
        torch._foreach_copy_(old, new)


def _check_model(model: Any) -> None:
    """Raise unless `model` is a causal VideoMamba for videos in eval mode."""
    if not isinstance(model, VideoMamba):
        raise TypeError(f"model is a {type(model).__name__}; allowed: a VideoMamba with bimamba=False")
    if model.training:
        raise ValueError("model is in training mode; allowed: eval mode, after model.eval()")
    if model.cls_token.is_meta:
        raise ValueError("model is on the meta device, where a stream has no memory; allowed: a device with weights")
    continuation(model.config, model.reads_mean, None, True, 0)  # raises for an image model and for a bidirectional one
