"""A teacher for masked pretraining: a CLIP vision model, of the library transformers, applied to every frame.

    teacher = ClipTeacher.from_pretrained("openai/clip-vit-base-patch16", config)  # or ClipTeacher(model, config)
    output = teacher(clips)
    mask = attention_mask(output.attention, 0.8)
    loss = alignment_loss(student(clips, mask).clip, keep_visible(output.features, mask))

The student's config has clip_output_dim=teacher.width and clip_return_layer=len(teacher.layers).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fused.io.video import MEAN, STD
from fused.models.retrieval.words import import_transformers
from fused.models.videomamba.config import VideoMambaConfig
from fused.rules import check_integer
from fused.runtime.autocast import no_autocast
from fused.runtime.checks import check_tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's own training images (arXiv 2103.00020)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class TeacherOutput(NamedTuple):
    """A teacher's output for clips, without gradient."""

    features: Tensor  # (K, B, 1 + T'*P, C) float32 of unit length, CLS first: the layout of `EncoderOutput.clip` without a mask
    attention: Tensor  # (B, T', P) float32: attention of CLS on the patches of each frame, for `attention_mask`


class ClipTeacher:
    """A frozen CLIP vision model over the frames of a clip, as in VideoMamba's masked pretraining (UMT, arXiv 2303.16058).

    `model` is a `transformers.CLIPVisionModelWithProjection`, whose features are projected (C = projection_dim), or a
    `CLIPVisionModel` (C = hidden_size), with any `attn_implementation`; it is put into eval mode and its parameters are
    frozen. `config` is the student's. `layers` are indices of the teacher's layers, from 0, in ascending order, or the number
    of last layers; None: the student's clip_return_layer.

    CLIP sees the first frame of each tubelet, resized (bicubic) to its image size, and renormalised from ImageNet's mean and
    standard deviation to its own. The CLS feature is the mean over the frames. CLIP's last norm is left out, as upstream does.

    Raises ValueError where the grids of patches differ or a layer does not exist, TypeError for another model, ImportError
    without transformers.
    """

    def __init__(self, model: Any, config: VideoMambaConfig, layers: int | Sequence[int] | None = None) -> None:
        library = import_transformers()
        if not isinstance(model, library.CLIPVisionModel | library.CLIPVisionModelWithProjection):
            allowed = "a transformers CLIPVisionModel or CLIPVisionModelWithProjection"
            raise TypeError(f"ClipTeacher: model must be {allowed}, got {type(model).__name__}")
        self.model, self.config = model.eval().requires_grad_(False), config
        self._vision = getattr(model, "vision_model", model)  # the vision model without the projection
        self._project = getattr(model, "visual_projection", None)
        self._image_size, patch_size = model.config.image_size, model.config.patch_size
        side = self._image_size // patch_size
        if config.grid != (side, side):
            allowed = f"{(side, side)}, this teacher's with images of {self._image_size} and patches of {patch_size} pixels"
            raise ValueError(f"ClipTeacher: config has a grid of {config.grid} patches; allowed is {allowed}")
        self.layers = _layer_indices(config.clip_return_layer if layers is None else layers, model.config.num_hidden_layers)
        self.width = model.config.hidden_size if self._project is None else model.config.projection_dim

    @classmethod
    def from_pretrained(
        cls, source: str, config: VideoMambaConfig, layers: int | Sequence[int] | None = None, **options: Any
    ) -> "ClipTeacher":
        """Return a teacher with the weights of a folder, or of a name on the Hugging Face Hub.

        Of a complete CLIP the vision model with projection is loaded. `options` go to transformers' `from_pretrained`. Raises
        ValueError for a model that is no CLIP, OSError where nothing can be loaded, and the errors of `ClipTeacher`.
        """
        library = import_transformers()
        found = (library.AutoConfig.from_pretrained(source).architectures or ["none"])[0]
        if found not in ("CLIPModel", "CLIPVisionModelWithProjection", "CLIPVisionModel"):
            allowed = "CLIPModel, CLIPVisionModelWithProjection or CLIPVisionModel"
            raise ValueError(f"ClipTeacher: source {source} holds the model {found}; allowed: {allowed}")
        kind = library.CLIPVisionModel if found == "CLIPVisionModel" else library.CLIPVisionModelWithProjection
        return cls(kind.from_pretrained(source, **options), config, layers)

    @torch.no_grad()
    def __call__(self, clips: Float[Tensor, "B C T H W"]) -> TeacherOutput:
        """Return features and attention for clips (B, 3, T, H, W), normalised as `ClipFolder` does, on the model's device.

        Raises ValueError or TypeError for clips that do not fit the student.
        """
        (height, width), tubelets = self.config.sides, self.config.tubelets
        sizes = {"C": 3, "T": tubelets * self.config.kernel_size, "H": height, "W": width}
        check_tensor("ClipTeacher", "clips", clips, "B C T H W", sizes, self.model.device)
        frames = clips[:, :, :: self.config.kernel_size].transpose(1, 2).flatten(0, 1)
        images = _renormalise(frames, self._image_size).to(self.model.dtype)
        hidden = self.model(images, output_hidden_states=True).hidden_states
        features = torch.stack([self._features(hidden[i + 1], tubelets) for i in self.layers])  # 0 is the first layer's input
        return TeacherOutput(features, self._attention(hidden[-2]).unflatten(0, (-1, tubelets)))

    def _features(self, hidden: Tensor, tubelets: int) -> Tensor:
        """Return features (B, 1 + T'*P, C) of unit length, for hidden states (B*T', 1 + P, hidden_size)."""
        hidden = hidden.unflatten(0, (-1, tubelets))
        tokens = torch.cat((hidden[:, :, 0].mean(1, keepdim=True), hidden[:, :, 1:].flatten(1, 2)), dim=1)
        return F.normalize((tokens if self._project is None else self._project(tokens)).float(), dim=-1)

    def _attention(self, hidden: Tensor) -> Tensor:
        """Return the attention (B*T', P) of CLS in the last layer, mean over heads, for its input (B*T', 1 + P, hidden_size).

        It is computed here because transformers returns attention only from its eager implementation, and then for all layers
        and tokens.
        """
        layer = self._vision.encoder.layers[-1]
        tokens, heads = layer.layer_norm1(hidden), self.model.config.num_attention_heads
        query, key = layer.self_attn.q_proj(tokens[:, :1]), layer.self_attn.k_proj(tokens)
        query, key = (x.unflatten(-1, (heads, -1)).transpose(1, 2).float() for x in (query, key))
        with no_autocast(key.device):
            scores = query @ key.transpose(-1, -2) / key.shape[-1] ** 0.5
            return scores.softmax(-1)[:, :, 0, 1:].mean(1)


def _layer_indices(layers: int | Sequence[int], depth: int) -> tuple[int, ...]:
    """Return ascending indices of layers, from those indices or from the number of last layers. Raise ValueError for others."""
    if isinstance(layers, int):
        check_integer("ClipTeacher", "layers", layers, 1, depth)
        return tuple(range(depth - layers, depth))
    for layer in layers:
        check_integer("ClipTeacher", "a layer", layer, 0, depth - 1)
    if not layers or list(layers) != sorted(set(layers)):
        raise ValueError(f"ClipTeacher: layers must be ascending numbers, at least one, got {list(layers)}")
    return tuple(layers)


def _renormalise(frames: Tensor, size: int) -> Tensor:
    """Return frames (N, 3, size, size) normalised by CLIP's values, for (N, 3, H, W) normalised by ImageNet's; float32."""
    frames = frames.float()
    if frames.shape[-2:] != (size, size):
        frames = F.interpolate(frames, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    mean, std, clip_mean, clip_std = (frames.new_tensor(x)[:, None, None] for x in (MEAN, STD, CLIP_MEAN, CLIP_STD))
    return (frames * std + mean - clip_mean) / clip_std
