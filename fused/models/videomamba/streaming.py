"""The arguments with which a causal model's forward continues a video: checked, and in one form."""

from typing import NamedTuple

from fused.models.videomamba.config import VideoMambaConfig
from fused.modules.state import State, States, unpack


class Continuation(NamedTuple):
    """The state that a forward continues, and the position of its chunk in the video; all None for a whole video."""

    states: list[State] | None = None  # (conv_state, ssm_state) of every layer; None: zeros
    mean: State | None = None  # (count, total) of the running mean, if the model reads one
    offset: int | None = None  # tubelets before this chunk


def continuation(
    config: VideoMambaConfig, reads_mean: bool, state: States | None, return_state: bool, offset: int | None,
    use_image: bool = False,
) -> Continuation:  # fmt: skip
    """Return the continuation that the arguments of a model's forward ask for.

    `state` is the forward's `ssm_state`, `offset` its `temporal_pos_offset` in tubelets. `reads_mean` says whether (count,
    total) of a running mean is the last entry of `state`.

    Raises ValueError for a model that cannot be streamed and for arguments that do not go together, and what `unpack` raises.
    """
    if state is None and not return_state and offset is None:
        return Continuation()
    if use_image or config.num_frames is None:
        raise ValueError(
            "an image is not streamed: ssm_state, return_state and temporal_pos_offset are for videos. A frame of a video "
            "is a clip (B, C, kernel_size, H, W), and use_image is False"
        )
    if config.bimamba:
        raise ValueError(
            "a bidirectional model cannot be streamed: one of its directions starts at the last token of the video, so "
            "that a chunk would need the future. Run the whole clip at once, or build the model with bimamba=False"
        )
    if state is None:
        if offset:
            raise ValueError(
                f"temporal_pos_offset is {offset} without an ssm_state: pass what the chunk before returned for "
                "return_state=True, or init_state(batch_size) to forget what was before"
            )
        return Continuation(offset=0)
    if offset is None:
        raise ValueError(
            "ssm_state came without temporal_pos_offset; allowed: the tubelets of all chunks before, 0 for a state that "
            "init_state made"
        )
    pairs = unpack(state, config.depth, reads_mean, "ssm_state")
    return Continuation(pairs[: config.depth], pairs[-1] if reads_mean else None, offset)
