"""The parts of a BIMBA that are models of the library transformers: SigLIP's vision tower and the language model Qwen2."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

SIGLIP = {  # google/siglip-so400m-patch14-384, whose last layer LLaVA leaves out
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26, "num_attention_heads": 16, "image_size": 384,
    "patch_size": 14,
}  # fmt: skip


def vision_tower(sizes: Mapping[str, Any]) -> nn.Module:
    """Return a `SiglipVisionModel` with random weights and without its pooling head; `sizes` override those of `SIGLIP`.

    Raises ValueError for sizes that no tower has, ImportError without transformers.
    """
    library = _transformers()
    config = _config(library.SiglipVisionConfig, {**SIGLIP, **sizes, "vision_use_head": False})
    return library.SiglipVisionModel(config)


def language_model(config: Mapping[str, Any]) -> Any:
    """Return a `Qwen2ForCausalLM` with random weights; of `config`, a published config.json, Qwen2's own fields are read.

    Raises ValueError for fields that Qwen2 does not take, ImportError without transformers.
    """
    library = _transformers()
    fields = {k: v for k, v in config.items() if k not in ("model_type", "architectures", "auto_map", "_name_or_path")}
    return library.Qwen2ForCausalLM(_config(library.Qwen2Config, fields))


def prepare_frames(frames: UInt8[Tensor, "F H W 3"], side: int) -> Float[Tensor, "F 3 S S"]:
    """Return frames (F, H, W, 3) as the vision tower takes them: resized (bicubic) to its square, between -1 and 1."""
    pixels = F.interpolate(frames.permute(0, 3, 1, 2).float(), size=(side, side), mode="bicubic", antialias=True)
    return pixels.clamp(0, 255) / 127.5 - 1


def patch_features(tower: nn.Module, frames: Tensor) -> Tensor:
    """Return the patches (F, rows, columns, width) of frames (F, 3, S, S) behind the last layer, before the last norm."""
    model: Any = getattr(tower, "vision_model", tower)
    encoded = model.encoder(inputs_embeds=model.embeddings(frames)).last_hidden_state
    side = frames.shape[-1] // model.embeddings.patch_size
    return encoded.unflatten(1, (-1, side))


def _config(kind: Any, fields: Mapping[str, Any]) -> Any:
    """Return a configuration of transformers. Raises ValueError for fields that it refuses, by an exception of its own."""
    try:
        return kind(**fields)
    except Exception as error:
        raise ValueError(f"config.json is no {kind.__name__}: {error}") from error


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("Bimba needs transformers: pip install 'videomamba-bench[teachers]'") from error
    return transformers
