"""VideoMamba for NVIDIA GPUs, fast; on any other device in plain PyTorch. Same names as `reference`, no code of it.

    from fused import VideoMamba, VideoMambaConfig
    logits = VideoMamba(VideoMambaConfig.middle(num_classes=400))(torch.randn(1, 3, 8, 224, 224))

Its logger is "fused": the chosen backend at INFO, which Python shows only where asked for, and warnings.
"""

from .backends import BackendError
from .checkpoint import LoadReport, load_checkpoint
from .config import VideoMambaConfig
from .conv import causal_conv1d
from .export import OnnxExport, export_onnx
from .mixer import Mamba
from .norm import add_norm
from .published import PRETRAINED
from .registry_timm import register_timm
from .scan import bidirectional_scan, selective_scan
from .stamp import Validation, validation
from .state import detach_state, state_to
from .storage import CheckpointError, read_checkpoint, save_checkpoint
from .stream import FrameStream
from .videomamba import DistillOutput, EncoderOutput, VideoMamba, VideoMambaEncoder, build_videomamba

__all__ = [
    "PRETRAINED",
    "BackendError",
    "CheckpointError",
    "DistillOutput",
    "EncoderOutput",
    "FrameStream",
    "LoadReport",
    "Mamba",
    "OnnxExport",
    "Validation",
    "VideoMamba",
    "VideoMambaConfig",
    "VideoMambaEncoder",
    "add_norm",
    "bidirectional_scan",
    "build_videomamba",
    "causal_conv1d",
    "detach_state",
    "export_onnx",
    "load_checkpoint",
    "read_checkpoint",
    "register_timm",
    "save_checkpoint",
    "selective_scan",
    "state_to",
    "validation",
]
