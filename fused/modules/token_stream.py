"""A mixer run token by token at low latency: on a GPU each token is one replay of a CUDA graph.

    stream = TokenStream(mixer.eval(), batch_size=1)
    for u in tokens:  # (B, D)
        y = stream(u)

The time and the memory of a token do not depend on the number of tokens before it.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fused.modules.mamba import Mamba
from fused.modules.mamba2 import Mamba2
from fused.modules.wrapped import weight_of
from fused.runtime.autocast import autocast_of_graph
from fused.runtime.graphs import CudaRecorder, Recorder, Recording, warm


class TokenStream:
    """A causal `Mamba` or `Mamba2`, with the state of `batch_size` sequences, which is written in place.

    Outputs are those of `mixer(u, state=state, return_state=True)`, without gradients. `state` is (conv_state, ssm_state) after
    the last token; copy a state into them to go on from it, as after a prompt that was run at once.

    `graph` says whether to replay a CUDA graph; None means on CUDA. The constructor records the graph, under the autocast that
    is on at that time. The graph reads the parameters at the addresses that they have at that time: new values may be copied
    into them, but moving or replacing them has no effect on the graph.

    Raises TypeError for another module, ValueError for a bidirectional mixer, for graph=True off CUDA and for a `batch_size`
    that is no positive integer, BackendError for a backend that cannot run.
    """

    def __init__(self, mixer: nn.Module, batch_size: int = 1, *, graph: bool | None = None) -> None:
        if not isinstance(mixer, (Mamba, Mamba2)):
            raise TypeError(f"mixer is a {type(mixer).__name__}; allowed: a Mamba or Mamba2 with bimamba=False")
        weight = weight_of(mixer.in_proj)
        if graph and weight.device.type != "cuda":
            raise ValueError(f"graph is True, but the mixer is on {weight.device}; a CUDA graph needs it on a CUDA device")
        self.mixer = mixer
        self._autocast = autocast_of_graph(weight.device)
        with torch.inference_mode(False), torch.no_grad():
            self.state = mixer.init_state(batch_size)
            self._token = weight.new_zeros(batch_size, 1, mixer.d_model)
            self._parameters = [p.detach() for p in mixer.parameters()]  # the graph reads this memory
            wanted = weight.device.type == "cuda" if graph is None else graph
            self._recording = self._record(CudaRecorder(weight.device)) if wanted else None
        self.reset()

    def reset(self) -> None:
        """Begin other sequences: set the state to zero."""
        with torch.inference_mode(False), torch.no_grad():
            for x in self.state:
                x.zero_()

    def __call__(self, u: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """Return the output for the next token of each sequence, (B, D); it is the caller's: later tokens do not write into it.

        Raises ValueError for another shape, TypeError for another dtype than the parameters'.
        """
        token = self._token
        if not isinstance(u, Tensor) or u.shape != token[:, 0].shape:
            found = tuple(u.shape) if isinstance(u, Tensor) else type(u).__name__
            raise ValueError(f"u is {found}; allowed: {tuple(token[:, 0].shape)}, a token of each sequence")
        if u.dtype != token.dtype:
            raise TypeError(f"u is {u.dtype}; allowed: {token.dtype}, as the mixer's parameters")
        with torch.inference_mode(False), torch.no_grad():
            token.copy_(u[:, None])
            if self._recording is None:
                return self._advance()
            self._recording.replay()
            return self._recording.output.clone()

    def _advance(self) -> Tensor:
        """Return the output for the token in the buffer, and write the new state over the old one."""
        with self._autocast():
            out, state = self.mixer(self._token, state=self.state, return_state=True)
        for old, new in zip(self.state, state, strict=True):
            old.copy_(new)
        return out[:, 0]

    def _record(self, recorder: Recorder) -> Recording:
        """Return the recording of a token."""
        warm(recorder, self._advance)
        return recorder.record(self._advance)
