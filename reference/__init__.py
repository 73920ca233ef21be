"""The specification: VideoMamba, Vamba and BIMBA in plain PyTorch, token by token, on any device and in any floating dtype."""

from reference.models.bimba.compressor import BimbaCompressor
from reference.models.bimba.interleave import interleave
from reference.models.bimba.model import Bimba
from reference.models.bimba.queries import bimba_queries
from reference.models.vamba.cache import VambaCache
from reference.models.vamba.config import VambaConfig
from reference.models.vamba.layer import VambaDecoderLayer
from reference.models.vamba.model import Vamba, VambaOutput
from reference.models.videomamba.chunked import approximate, forward_chunked
from reference.models.videomamba.config import VideoMambaConfig
from reference.models.videomamba.model import DistillOutput, EncoderOutput, VideoMamba, VideoMambaEncoder, build_videomamba
from reference.modules.mamba import Mamba
from reference.modules.mamba2 import Mamba2
from reference.modules.state import detach_state, state_to
from reference.ops.add_norm import add_norm
from reference.ops.causal_conv1d import causal_conv1d
from reference.ops.selective_scan import selective_scan
from reference.ops.ssd import ssd

__all__ = [
    "Bimba",
    "BimbaCompressor",
    "DistillOutput",
    "EncoderOutput",
    "Mamba",
    "Mamba2",
    "Vamba",
    "VambaCache",
    "VambaConfig",
    "VambaDecoderLayer",
    "VambaOutput",
    "VideoMamba",
    "VideoMambaConfig",
    "VideoMambaEncoder",
    "add_norm",
    "approximate",
    "bimba_queries",
    "build_videomamba",
    "causal_conv1d",
    "detach_state",
    "forward_chunked",
    "interleave",
    "selective_scan",
    "ssd",
    "state_to",
]
