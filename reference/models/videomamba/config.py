"""One description of a VideoMamba, for the image model, the video classifier and the masked-pretraining encoder."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from reference.models.videomamba.scan_order import SCAN_ORDERS

POOL_TYPES = ("cls", "avg", "cls+avg", "cls_cat_avg", "last")
READOUTS = ("cls", "mean", "last", "tokens")
CLIP_NORM_TYPES = ("l2", "none")


@dataclass(frozen=True)
class VideoMambaConfig:
    """The configuration; fields and defaults are upstream's (image_sm, video_sm, video_mm), None where a value is derived.

    num_frames=None is the image model: two-dimensional patches, no temporal embedding. kernel_size is the length of a tubelet
    in frames. Construction raises ValueError, naming the field, its value and the allowed values.
    """

    img_size: int | tuple[int, int] = 224  # pixels, or (height, width)
    patch_size: int = 16
    stride: int | None = None  # pixels from patch to patch; None: patch_size, which divides img_size
    depth: int = 24
    embed_dim: int = 192
    channels: int = 3
    num_classes: int = 1000  # 0: no head, the classifier returns its feature
    kernel_size: int = 1
    num_frames: int | None = 8
    drop_rate: int | float = 0.0
    drop_path_rate: int | float | None = None  # None: 0.1 in the classifier, 0 in the encoder
    fc_drop_rate: int | float = 0.0
    ssm_cfg: Mapping[str, Any] | None = field(default=None, hash=False)  # keyword arguments of the mixer
    norm_epsilon: int | float = 1e-5
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    bimamba: bool = True
    use_checkpoint: bool = False
    checkpoint_num: int = 0  # with use_checkpoint, how many first layers recompute their mixer in the backward
    readout: str = "cls"  # of the classifier; a causal one needs another, see `VideoMamba`
    pool_type: str = "cls+avg"  # of the encoder; a causal one needs "avg" or "last"
    clip_decoder_embed_dim: int | None = None  # None: embed_dim
    clip_output_dim: int = 512
    clip_norm_type: str = "l2"
    clip_return_layer: int = 1  # how many layers are aligned with the teacher; 0: no decoder
    clip_student_return_interval: int | float = 1
    add_pool_norm: bool = True
    distill_dim: int | None = None  # width of the teacher of self-distillation
    ckpt_num_frame: int | None = None  # -1, upstream's default, is None
    pretrained: str | None = None
    scan_order: str = "spatial"

    def __post_init__(self) -> None:
        if isinstance(self.img_size, list):
            object.__setattr__(self, "img_size", tuple(self.img_size))
        if isinstance(self.ssm_cfg, Mapping):
            object.__setattr__(self, "ssm_cfg", dict(self.ssm_cfg))  # the caller may change theirs
        if self.ckpt_num_frame == -1:
            object.__setattr__(self, "ckpt_num_frame", None)

        positive = ("patch_size", "depth", "embed_dim", "channels", "kernel_size", "clip_output_dim")
        optional = ("stride", "num_frames", "clip_decoder_embed_dim", "distill_dim", "ckpt_num_frame")
        for name in positive + optional:
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            _require(_is_int(value) and value >= 1, name, value, "a positive integer" + " or None" * (name in optional))
        for name in ("num_classes", "checkpoint_num", "clip_return_layer"):
            value = getattr(self, name)
            _require(_is_int(value) and value >= 0, name, value, "an integer from 0 up")
        for name in ("drop_rate", "drop_path_rate", "fc_drop_rate"):
            rate = getattr(self, name)
            if rate is None and name == "drop_path_rate":
                continue
            _require(_is_number(rate) and 0 <= rate < 1, name, rate, "a rate from 0 up to, not including, 1")
        for name in ("norm_epsilon", "clip_student_return_interval"):
            value = getattr(self, name)
            _require(_is_number(value) and 0 < value < float("inf"), name, value, "a positive number")
        for name in ("rms_norm", "residual_in_fp32", "fused_add_norm", "bimamba", "use_checkpoint", "add_pool_norm"):
            _require(getattr(self, name) in (True, False), name, getattr(self, name), "True or False")
        for name, allowed in (("pool_type", POOL_TYPES), ("readout", READOUTS), ("clip_norm_type", CLIP_NORM_TYPES),
                              ("scan_order", SCAN_ORDERS)):  # fmt: skip
            _require(getattr(self, name) in allowed, name, getattr(self, name), "one of " + ", ".join(map(repr, allowed)))
        fits = len(self.sides) == 2 and all(_is_int(side) and side >= self.patch_size for side in self.sides)
        _require(fits, "img_size", self.img_size,
                 f"pixels, or (height, width), each at least patch_size ({self.patch_size})")  # fmt: skip
        whole = self.stride is not None or all(side % self.patch_size == 0 for side in self.sides)
        _require(whole, "img_size", self.img_size,
                 f"multiples of patch_size ({self.patch_size}); stride={self.patch_size} crops the rest")  # fmt: skip
        if self.num_frames is not None:
            _require(self.num_frames % self.kernel_size == 0, "num_frames", self.num_frames,
                     f"a multiple of kernel_size ({self.kernel_size})")  # fmt: skip
        if self.ssm_cfg is not None:
            _require(isinstance(self.ssm_cfg, Mapping), "ssm_cfg", self.ssm_cfg, "a mapping of the mixer's keyword arguments")
            unknown = set(self.ssm_cfg) - SSM_FIELDS
            _require(not unknown, "ssm_cfg", sorted(unknown), "keys among " + ", ".join(sorted(SSM_FIELDS)))
        if self.clip_decoder_embed_dim not in (None, self.embed_dim):
            raise ValueError(
                f"clip_decoder_embed_dim is {self.clip_decoder_embed_dim}; it must equal embed_dim ({self.embed_dim}), whose "
                "tokens enter the decoder, or be None"
            )
        layers = self.student_layers()
        _require(len(set(layers)) == len(layers) and all(j >= 0 for j in layers), "clip_return_layer", self.clip_return_layer,
                 f"as many distinct layers as depth ({self.depth}) and clip_student_return_interval leave")  # fmt: skip

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of a frame in pixels."""
        return self.img_size if isinstance(self.img_size, tuple) else (self.img_size, self.img_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Number of patches of one frame: (down, across)."""
        height, width = self.sides
        step = self.stride or self.patch_size
        return (height - self.patch_size) // step + 1, (width - self.patch_size) // step + 1

    @property
    def patches(self) -> int:
        """Number of patches of one frame."""
        return self.grid[0] * self.grid[1]

    @property
    def tubelets(self) -> int:
        """Number of tubelets of a clip, which is its length after the patch embedding; 1 for the image model."""
        return 1 if self.num_frames is None else self.num_frames // self.kernel_size

    def student_layers(self) -> tuple[int, ...]:
        """Return the indices, ascending, of the layers whose output the CLIP decoder aligns with the teacher."""
        return tuple(sorted(self.depth - 1 - int(i * self.clip_student_return_interval) for i in range(self.clip_return_layer)))

    @classmethod
    def tiny(cls, **overrides: Any) -> "VideoMambaConfig":
        """Return VideoMamba-Ti: width 192, 24 layers, 7 M parameters."""
        return cls(**{"embed_dim": 192, "depth": 24} | overrides)

    @classmethod
    def small(cls, **overrides: Any) -> "VideoMambaConfig":
        """Return VideoMamba-S: width 384, 24 layers, 26 M parameters."""
        return cls(**{"embed_dim": 384, "depth": 24} | overrides)

    @classmethod
    def middle(cls, **overrides: Any) -> "VideoMambaConfig":
        """Return VideoMamba-M: width 576, 32 layers, 74 M parameters."""
        return cls(**{"embed_dim": 576, "depth": 32} | overrides)

    @classmethod
    def base(cls, **overrides: Any) -> "VideoMambaConfig":
        """Return VideoMamba-B: width 768, 24 layers, 98 M parameters."""
        return cls(**{"embed_dim": 768, "depth": 24} | overrides)


SSM_FIELDS = frozenset(
    "d_state d_conv expand dt_rank dt_min dt_max dt_init dt_scale dt_init_floor conv_bias bias use_fast_path".split()
)


def _is_int(value: object) -> bool:
    """Return whether the value is an integer; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    """Return whether the value is a real number; True and False are not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    """Raise ValueError unless `holds`, naming the field, its value and the allowed values."""
    if not holds:
        raise ValueError(f"{name} is {value!r}; allowed: {allowed}")
