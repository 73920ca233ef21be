"""The configuration of VideoMamba: one frozen description for image model, video classifier and pretraining encoder."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from fused.models.videomamba.scan_order import SCAN_ORDERS
from fused.rules import COUNT, COUNT_OR_0, FLAG, POSITIVE, RATE, Rule, check_field_names, invalid, is_integer, one_of

POOL_TYPES = ("cls", "avg", "cls+avg", "cls_cat_avg", "last")
READOUTS = ("cls", "mean", "last", "tokens")
CLIP_NORM_TYPES = ("l2", "none")
SSM_FIELDS = (
    "d_state", "d_conv", "expand", "dt_rank", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "conv_bias", "bias",
    "use_fast_path",
)  # fmt: skip


@dataclass(frozen=True)
class VideoMambaConfig:
    """The configuration of a model: upstream's fields with upstream's defaults, None where a value follows from other fields.

    `num_frames=None` describes the image model (two-dimensional patches, no temporal embedding). Raises ValueError or
    TypeError at construction; the message names the field, its value and the allowed values.
    """

    img_size: int | tuple[int, int] = 224  # one side, or (height, width), in pixels; multiples of patch_size without a stride
    patch_size: int = 16
    stride: int | None = None  # None: patch_size; pixels that no patch covers are cropped, as by upstream's convolution
    depth: int = 24
    embed_dim: int = 192
    channels: int = 3
    num_classes: int = 1000  # 0: the classifier returns its feature
    kernel_size: int = 1  # frames that make one tubelet
    num_frames: int | None = 8
    drop_rate: int | float = 0.0
    drop_path_rate: int | float | None = None  # None: 0.1 for the classifier, 0 for the encoder
    fc_drop_rate: int | float = 0.0
    ssm_cfg: Mapping[str, Any] | None = field(default=None, hash=False)  # keyword arguments of every mixer
    norm_epsilon: int | float = 1e-5
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    bimamba: bool = True
    use_checkpoint: bool = False
    checkpoint_num: int = 0  # with use_checkpoint, the number of first layers whose mixers are recomputed in the backward pass
    readout: str = "cls"  # what the classifier's head reads; causal models: not "cls"
    pool_type: str = "cls+avg"  # what the encoder pools; causal models: "avg" or "last"
    clip_decoder_embed_dim: int | None = None  # None: embed_dim
    clip_output_dim: int = 512
    clip_norm_type: str = "l2"
    clip_return_layer: int = 1  # layers aligned with the teacher; 0: no CLIP decoder
    clip_student_return_interval: int | float = 1
    add_pool_norm: bool = True
    distill_dim: int | None = None  # the teacher's width in self-distillation
    ckpt_num_frame: int | None = None  # -1 is upstream's None
    pretrained: str | None = None
    scan_order: str = "spatial"

    def __new__(cls, *args: Any, **given: Any) -> "VideoMambaConfig":
        """Return the object that __init__ fills; raise TypeError, with the nearest field's name, for an unknown field."""
        check_field_names(cls, given)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if isinstance(self.img_size, list):
            object.__setattr__(self, "img_size", tuple(self.img_size))  # a list has no hash
        if isinstance(self.ssm_cfg, Mapping):
            object.__setattr__(self, "ssm_cfg", dict(self.ssm_cfg))  # the caller's mapping may change, or not pickle
        if isinstance(self.ckpt_num_frame, int) and self.ckpt_num_frame == -1:
            object.__setattr__(self, "ckpt_num_frame", None)
        for f in fields(self):
            if f.name in _RULES:
                _RULES[f.name].check(f.name, getattr(self, f.name))
        self._check_combinations()

    def _check_combinations(self) -> None:
        """Raise ValueError for a field whose value does not go with that of another."""
        if not all(is_integer(side, self.patch_size) for side in self.sides) or len(self.sides) != 2:
            allowed = f"pixels, or (height, width), each at least patch_size ({self.patch_size})"
            raise invalid("img_size", self.img_size, allowed)
        if self.stride is None and any(side % self.patch_size for side in self.sides):
            P, side = self.patch_size, next(side for side in self.sides if side % self.patch_size)
            low = side // P * P
            allowed = f"multiples of patch_size ({P}), such as {low} or {low + P}; stride={P} crops the rest"
            raise invalid("img_size", self.img_size, allowed)
        if self.num_frames is not None and self.num_frames % self.kernel_size:
            raise invalid("num_frames", self.num_frames, f"a multiple of kernel_size ({self.kernel_size}), or None")
        unknown = sorted(set(self.ssm_cfg or ()) - set(SSM_FIELDS), key=str)
        if unknown:
            raise invalid("ssm_cfg", unknown, "keys among " + ", ".join(sorted(SSM_FIELDS)))
        if self.clip_decoder_embed_dim not in (None, self.embed_dim):
            allowed = f"embed_dim ({self.embed_dim}), whose tokens enter the decoder, or None for the same"
            raise invalid("clip_decoder_embed_dim", self.clip_decoder_embed_dim, allowed)
        layers = self.student_layers() if self.clip_return_layer <= self.depth else (-1,)
        if any(layer < 0 for layer in layers) or len(set(layers)) < len(layers):
            allowed = (
                f"as many distinct layers as depth ({self.depth}) and clip_student_return_interval "
                f"({self.clip_student_return_interval}) leave"
            )
            raise invalid("clip_return_layer", self.clip_return_layer, allowed)

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of a frame in pixels."""
        return self.img_size if isinstance(self.img_size, tuple) else (self.img_size, self.img_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches in one frame."""
        step = self.stride or self.patch_size
        rows, columns = (1 + (side - self.patch_size) // step for side in self.sides)
        return rows, columns

    @property
    def patches(self) -> int:
        """Patches in one frame."""
        rows, columns = self.grid
        return rows * columns

    @property
    def tubelets(self) -> int:
        """Tubelets of a clip, the time steps after the patch embedding; an image has 1."""
        return self.num_frames // self.kernel_size if self.num_frames is not None else 1

    def student_layers(self) -> tuple[int, ...]:
        """Return the numbers of the layers whose features the CLIP decoders read, ascending."""
        last, gap = self.depth - 1, self.clip_student_return_interval
        return tuple(last - int(k * gap) for k in reversed(range(self.clip_return_layer)))

    @classmethod
    def tiny(cls, **overrides: Any) -> "VideoMambaConfig":
        """Return the configuration of VideoMamba-Ti, 7 M parameters."""
        return cls(**{"embed_dim": 192, "depth": 24, **overrides})

    @classmethod
    def small(cls, **overrides: Any) -> "VideoMambaConfig":
        """Return the configuration of VideoMamba-S, 26 M parameters."""
        return cls(**{"embed_dim": 384, "depth": 24, **overrides})

    @classmethod
    def middle(cls, **overrides: Any) -> "VideoMambaConfig":
        """Return the configuration of VideoMamba-M, 74 M parameters."""
        return cls(**{"embed_dim": 576, "depth": 32, **overrides})

    @classmethod
    def base(cls, **overrides: Any) -> "VideoMambaConfig":
        """Return the configuration of VideoMamba-B, 98 M parameters."""
        return cls(**{"embed_dim": 768, "depth": 24, **overrides})


def check_config(config: object) -> None:
    """Raise TypeError, with the way to make one, unless `config` is a `VideoMambaConfig`."""
    if not isinstance(config, VideoMambaConfig):
        raise TypeError(
            f"config is a {type(config).__name__}; allowed: a VideoMambaConfig, such as VideoMambaConfig.tiny(num_classes=10). "
            "from_pretrained makes a model by its name or folder"
        )


_RULES = (
    dict.fromkeys(("patch_size", "depth", "embed_dim", "channels", "kernel_size", "clip_output_dim"), COUNT)
    | dict.fromkeys(("stride", "num_frames", "clip_decoder_embed_dim", "distill_dim", "ckpt_num_frame"), COUNT.optional())
    | dict.fromkeys(("num_classes", "checkpoint_num", "clip_return_layer"), COUNT_OR_0)
    | dict.fromkeys(("drop_rate", "fc_drop_rate"), RATE)
    | dict.fromkeys(("norm_epsilon", "clip_student_return_interval"), POSITIVE)
    | dict.fromkeys(("rms_norm", "residual_in_fp32", "fused_add_norm", "bimamba", "use_checkpoint", "add_pool_norm"), FLAG)
    | {
        "drop_path_rate": RATE.optional(),
        "pool_type": one_of(POOL_TYPES),
        "readout": one_of(READOUTS),
        "clip_norm_type": one_of(CLIP_NORM_TYPES),
        "scan_order": one_of(SCAN_ORDERS),
        "ssm_cfg": Rule(lambda value: isinstance(value, Mapping), "a mapping of the mixer's keywords").optional(),
    }
)
