"""VideoMamba on fused kernels for NVIDIA GPUs, and in plain PyTorch on any other device.

The names are those of `reference`; no code is shared with it.

    from fused import VideoMamba, VideoMambaConfig
    logits = VideoMamba(VideoMambaConfig.middle(num_classes=400))(torch.randn(1, 3, 8, 224, 224))

The logger "fused" reports the chosen backend at level INFO, which Python hides by default, and warnings.
"""

from fused.errors import BackendError
from fused.io.checkpoint_file import CheckpointError, read_checkpoint, save_checkpoint
from fused.models.videomamba.config import VideoMambaConfig
from fused.models.videomamba.frame_stream import FrameStream
from fused.models.videomamba.load import LoadReport, load_checkpoint
from fused.models.videomamba.model import DistillOutput, EncoderOutput, VideoMamba, VideoMambaEncoder, build_videomamba
from fused.models.videomamba.onnx import OnnxExport, export_onnx
from fused.models.videomamba.published import PRETRAINED
from fused.models.videomamba.timm_registry import register_timm
from fused.modules.mamba import Mamba
from fused.modules.state import detach_state, state_to
from fused.ops.add_norm.api import add_norm
from fused.ops.causal_conv1d.api import causal_conv1d
from fused.ops.selective_scan.api import bidirectional_scan, selective_scan
from fused.stamp import Validation, validation

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
