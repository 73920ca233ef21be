"""The configuration of a video-text model: its video encoder, BERT's sizes, and the space in which both are compared."""

from dataclasses import dataclass, field, fields
from typing import Any

from fused.models.videomamba.config import VideoMambaConfig, check_config
from fused.rules import COUNT, COUNT_OR_0, FLAG, RATE, check_field_names, invalid


@dataclass(frozen=True)
class RetrievalConfig:
    """The configuration of a `VideoTextRetrieval`. The defaults are the published models': VideoMamba-M and BERT base.

    Names are those of BERT's config.json. Raises ValueError or TypeError at construction; the message names the
    field, its value and the allowed values.
    """

    video: VideoMambaConfig = field(default_factory=lambda: VideoMambaConfig.middle(clip_norm_type="none"))
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    fusion_layer: int = 9  # the first layer that reads the video; those before it see words only
    embed_dim: int = 512  # of the space in which videos and texts are compared
    dropout: int | float = 0.1  # of hidden values and of attention
    mlm: bool = True  # whether there is a head for masked words

    def __new__(cls, *args: Any, **given: Any) -> "RetrievalConfig":
        """Return the object that __init__ fills; raise TypeError, with the nearest field's name, for an unknown field."""
        check_field_names(cls, given)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_config(self.video)
        for f in fields(self):
            if f.name in _RULES:
                _RULES[f.name].check(f.name, getattr(self, f.name))
        if self.hidden_size % self.num_attention_heads:
            raise invalid("num_attention_heads", self.num_attention_heads, f"a divisor of hidden_size ({self.hidden_size})")
        if not self.fusion_layer < self.num_hidden_layers:
            raise invalid("fusion_layer", self.fusion_layer, f"below num_hidden_layers ({self.num_hidden_layers})")
        if not self.video.add_pool_norm or self.video.num_frames is None:
            pool, frames = self.video.add_pool_norm, self.video.num_frames
            raise invalid("video", f"add_pool_norm={pool}, num_frames={frames}", "add_pool_norm=True, and a number of frames")


_RULES = dict.fromkeys(
    ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings",
     "embed_dim"), COUNT,
) | {"fusion_layer": COUNT_OR_0, "dropout": RATE, "mlm": FLAG}  # fmt: skip
