"""VideoMamba, Vamba and BIMBA on fused kernels for NVIDIA GPUs and for CPUs, and in plain PyTorch on any other device.

The names are those of `reference`; no code is shared with it.

    from fused import VideoMamba, VideoMambaConfig
    logits = VideoMamba(VideoMambaConfig.middle(num_classes=400))(torch.randn(1, 3, 8, 224, 224))

The logger "fused" reports the chosen backend at level INFO, which Python hides by default, and warnings.
"""

import importlib.metadata
import tomllib
from pathlib import Path

from fused.errors import BackendError
from fused.io.checkpoint_file import CheckpointError, read_checkpoint, save_checkpoint
from fused.models.bimba.compressor import BimbaCompressor
from fused.models.bimba.interleave import interleave
from fused.models.bimba.model import Bimba
from fused.models.bimba.queries import bimba_queries
from fused.models.retrieval.config import RetrievalConfig
from fused.models.retrieval.model import RetrievalOutput, VideoTextRetrieval
from fused.models.vamba.cache import VambaCache
from fused.models.vamba.config import VambaConfig
from fused.models.vamba.layer import VambaDecoderLayer
from fused.models.vamba.model import Vamba, VambaOutput
from fused.models.videomamba.build import build_videomamba
from fused.models.videomamba.classify import classify
from fused.models.videomamba.config import VideoMambaConfig
from fused.models.videomamba.frame_stream import FrameStream
from fused.models.videomamba.load import LoadReport, load_checkpoint
from fused.models.videomamba.model import DistillOutput, EncoderOutput, VideoMamba, VideoMambaEncoder
from fused.models.videomamba.onnx import OnnxExport, export_onnx
from fused.models.videomamba.published import PRETRAINED
from fused.models.videomamba.timm_registry import register_timm
from fused.modules.mamba import Mamba
from fused.modules.mamba2 import Mamba2
from fused.modules.state import detach_state, state_to
from fused.modules.token_stream import TokenStream
from fused.ops.add_norm.api import add_norm
from fused.ops.causal_conv1d.api import causal_conv1d
from fused.ops.selective_scan.api import bidirectional_scan, selective_scan
from fused.ops.ssd.api import ssd
from fused.runtime.graphed import graphed
from fused.stamp import Validation, validation

__all__ = [
    "PRETRAINED",
    "BackendError",
    "Bimba",
    "BimbaCompressor",
    "CheckpointError",
    "DistillOutput",
    "EncoderOutput",
    "FrameStream",
    "LoadReport",
    "Mamba",
    "Mamba2",
    "OnnxExport",
    "RetrievalConfig",
    "RetrievalOutput",
    "TokenStream",
    "Validation",
    "Vamba",
    "VambaCache",
    "VambaConfig",
    "VambaDecoderLayer",
    "VambaOutput",
    "VideoMamba",
    "VideoMambaConfig",
    "VideoMambaEncoder",
    "VideoTextRetrieval",
    "add_norm",
    "bidirectional_scan",
    "bimba_queries",
    "build_videomamba",
    "causal_conv1d",
    "classify",
    "detach_state",
    "export_onnx",
    "graphed",
    "interleave",
    "load_checkpoint",
    "read_checkpoint",
    "register_timm",
    "save_checkpoint",
    "selective_scan",
    "ssd",
    "state_to",
    "validation",
]

DISTRIBUTION = "videomamba-bench"


def _version(folder: Path) -> str:
    """Return the project's version: that of pyproject.toml in the folder of a checkout, else the installed distribution's.

    A checkout comes first: it may be on the path while another version is installed.
    """
    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        if project["name"] == DISTRIBUTION:
            return str(project["version"])
    except (OSError, ValueError, KeyError):  # no checkout, or the file of another project
        pass
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


__version__ = _version(Path(__file__).resolve().parents[1])
