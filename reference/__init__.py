"""The specification: VideoMamba in plain PyTorch with a sequential scan, on any device and in any floating-point dtype."""

from reference.chunked import approximate, forward_chunked
from reference.config import VideoMambaConfig
from reference.conv import causal_conv1d
from reference.mixer import Mamba
from reference.norm import add_norm
from reference.scan import selective_scan
from reference.state import detach_state, state_to
from reference.videomamba import DistillOutput, EncoderOutput, VideoMamba, VideoMambaEncoder, build_videomamba

__all__ = [
    "DistillOutput",
    "EncoderOutput",
    "Mamba",
    "VideoMamba",
    "VideoMambaConfig",
    "VideoMambaEncoder",
    "add_norm",
    "approximate",
    "build_videomamba",
    "causal_conv1d",
    "detach_state",
    "forward_chunked",
    "selective_scan",
    "state_to",
]
