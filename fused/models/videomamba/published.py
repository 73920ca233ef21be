"""The weights that VideoMamba's authors published (huggingface.co/OpenGVLab/VideoMamba): names, files and configurations."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType

from fused.models.videomamba.config import VideoMambaConfig

REPOSITORY = "OpenGVLab/VideoMamba"
SIZES = {
    "t16": VideoMambaConfig.tiny,
    "s16": VideoMambaConfig.small,
    "m16": VideoMambaConfig.middle,
    "b16": VideoMambaConfig.base,
}
CLASSES = {"in1k": 1000, "k400": 400, "ssv2": 174, "breakfast": 10, "coin": 180}


@dataclass(frozen=True)
class Published:
    """One file of weights, with the class and the configuration of its model."""

    file: str
    model: str  # "VideoMamba" or "VideoMambaEncoder"
    config: VideoMambaConfig
    repository: str = REPOSITORY

    @property
    def url(self) -> str:
        """The file's address for a browser."""
        return f"https://huggingface.co/{self.repository}/resolve/main/{self.file}"


def _image_models() -> Iterator[Published]:
    """Yield the image classifiers."""
    for size, build in SIZES.items():
        for side, trained in ((224, "224"), (448, "224to448"), (576, "224to448to576")):
            if side == 224 or size != "b16":  # the base model has no larger one
                name = f"videomamba_{size}_in1k_res{trained}"
                yield Published(f"{name}.pth", "VideoMamba", build(num_classes=CLASSES["in1k"], num_frames=None, img_size=side))


def _video_models() -> Iterator[Published]:
    """Yield the video classifiers."""
    short = [(frames, 224, "224") for frames in (8, 16)]
    long = [(frames, 224, "224") for frames in (32, 64)]
    trained = {
        "k400": [*short, *long, (64, 384, "224to384")],
        "ssv2": [*short, (16, 288, "224to288")],
        "breakfast": long,
        "coin": long,
    }
    for data, variants in trained.items():
        for size in ("t16", "s16", "m16", "m16-mask"):
            size, _, mask = size.partition("-")
            start = f"videomamba_{size}_{data}{'_mask_ft' if mask else ''}"
            for frames, side, res in variants:
                config = SIZES[size](num_classes=CLASSES[data], num_frames=frames, img_size=side)
                yield Published(f"{start}_f{frames}_res{res}.pth", "VideoMamba", config)


def _encoders() -> Iterator[Published]:
    """Yield the encoders of masked pretraining and of video-text models."""
    for data in ("k400", "ssv2"):
        config = VideoMambaConfig.middle(num_frames=8, add_pool_norm=False)
        yield Published(f"videomamba_m16_{data}_mask_pt_f8_res224.pth", "VideoMambaEncoder", config)
    for data in ("5M", "17M", "25M"):
        config = VideoMambaConfig.middle(num_frames=8, clip_norm_type="none")
        yield Published(f"videomamba_m16_{data}_f8_res224.pth", "VideoMambaEncoder", config)


KINDS = (_image_models, _video_models, _encoders)
PRETRAINED = MappingProxyType({one.file.removesuffix(".pth"): one for kind in KINDS for one in kind()})
"""Published weights by name, the file's name without its suffix."""
