"""The encoder for the configuration of upstream's video_mm, a namespace."""

import logging
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

from fused.models.videomamba.config import VideoMambaConfig
from fused.models.videomamba.load import load_checkpoint
from fused.models.videomamba.model import VideoMambaEncoder

_log = logging.getLogger("fused")


def build_videomamba(config: SimpleNamespace | VideoMambaConfig, backend: str = "auto") -> VideoMambaEncoder:
    """Return the encoder for the `SimpleNamespace(vision_encoder=...)` of upstream's video_mm; any field may be absent.

    As there, pooled features are normed and decoded features have no unit length. The field `pretrained` is a file that
    `load_checkpoint` takes; it is loaded strictly. Raises what `VideoMambaConfig` and `load_checkpoint` raise.
    """
    if not isinstance(config, VideoMambaConfig):
        config = _from_namespace(config)
    model = VideoMambaEncoder(config, backend)
    if config.pretrained:
        load_checkpoint(model, config.pretrained)
    return model


def _from_namespace(config: SimpleNamespace) -> VideoMambaConfig:
    """Return the configuration for upstream's namespace; unknown fields are ignored with a warning."""
    given: dict[str, Any] = dict(vars(config.vision_encoder))
    unknown = sorted(given.keys() - {f.name for f in fields(VideoMambaConfig)})
    if unknown:
        _log.warning("build_videomamba ignores the unknown field(s) %s", ", ".join(unknown))
    return VideoMambaConfig(**{"clip_norm_type": "none", **{k: v for k, v in given.items() if k not in unknown}})
