"""VideoMamba in timm's registry: timm.create_model("videomamba_tiny", num_classes=..., pretrained=..., features_only=...)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from fused.io.picture import MEAN, STD
from fused.models.videomamba.model import VideoMamba
from fused.models.videomamba.published import PRETRAINED, SIZES
from fused.models.videomamba.timm_api import TokenFeatures

DEFAULT_TAGS = ("k400_f8_res224", "in1k_res224")  # tried in this order for a video model; an image model takes the second


def register_timm() -> None:
    """Register `videomamba_tiny`, `_small`, `_middle` and `_base` for `timm.create_model`; a second call does nothing.

    They take timm's `num_classes`, `in_chans`, `features_only`, `out_indices`, `pretrained` and `cache_dir`, the fields of
    `VideoMambaConfig` (num_frames=None is the image model), and `backend`. A tag names published weights:
    "videomamba_tiny.k400_f16_res224". Raises ImportError where timm cannot be imported.
    """
    try:
        from timm.models import is_model, register_model
    except Exception as error:  # a torchvision that was built for another PyTorch may raise any exception
        raise ImportError(
            f"timm cannot be imported ({error}): pip install 'videomamba-bench[timm]' and a torchvision that fits PyTorch"
        ) from error
    for entry in (videomamba_tiny, videomamba_small, videomamba_middle, videomamba_base):
        if not is_model(entry.__name__):
            register_model(entry)


def videomamba_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return a VideoMamba-Ti, 7 M parameters."""
    return _create("t16", pretrained, **kwargs)


def videomamba_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return a VideoMamba-S, 26 M parameters."""
    return _create("s16", pretrained, **kwargs)


def videomamba_middle(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return a VideoMamba-M, 74 M parameters."""
    return _create("m16", pretrained, **kwargs)


def videomamba_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return a VideoMamba-B, 98 M parameters."""
    return _create("b16", pretrained, **kwargs)


def _create(
    size: str,
    pretrained: bool,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Any = None,
    cache_dir: Any = None,
    features_only: bool = False,
    out_indices: Sequence[int] = (-1,),
    in_chans: int | None = None,
    backend: str = "auto",
    **fields: Any,
) -> nn.Module:
    """Return the model for timm's arguments. `pretrained_cfg` is the tag after the name, if any; timm's dictionaries for its
    own weights are refused with ValueError."""
    if pretrained_cfg_overlay or not isinstance(pretrained_cfg, str | None):
        raise ValueError("pretrained_cfg describes timm's own weights; name published ones by a tag, see fused.PRETRAINED")
    fields |= {} if in_chans is None else {"channels": in_chans}
    if not pretrained_cfg:
        fields.setdefault("num_frames", 8)
    name = _weights(size, pretrained_cfg, fields.get("num_frames") is None) if pretrained or pretrained_cfg else ""
    if pretrained:
        model = VideoMamba.from_pretrained(name, backend=backend, cache_dir=cache_dir, **fields)
    else:
        model = VideoMamba(replace(PRETRAINED[name].config if name else SIZES[size](), **fields), backend)
    sides = model.config.sides
    model.pretrained_cfg = model.default_cfg = {  # type: ignore[assignment]
        "architecture": f"videomamba_{size}", "tag": pretrained_cfg or "", "num_classes": model.num_classes,
        "input_size": (model.config.channels, *sides), "mean": MEAN, "std": STD, "interpolation": "bicubic", "crop_pct": 1.0,
        "first_conv": "patch_embed.proj", "classifier": "head",
    }  # fmt: skip
    return TokenFeatures(model, tuple(out_indices)) if features_only else model


def _weights(size: str, tag: str | None, image: bool) -> str:
    """Return the name of the published weights for a tag, or the default without one. Raises ValueError for an unknown tag."""
    known = [name for name in PRETRAINED if name.startswith(f"videomamba_{size}_")]
    tags = (tag,) if tag else DEFAULT_TAGS[1:] if image else DEFAULT_TAGS
    for name in (f"videomamba_{size}_{one}" for one in tags):
        if name in known:
            return name
    allowed = ", ".join(name.removeprefix(f"videomamba_{size}_") for name in known)
    raise ValueError(f"there are no published weights {tag!r} of this size; allowed: {allowed}")
