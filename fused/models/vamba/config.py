"""The configuration of a Vamba: sizes of Qwen2-VL's decoder, and keywords of the Mamba-2 mixers."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fused.modules.mamba2 import Mamba2
from fused.rules import COUNT, FLAG, POSITIVE, check_field_names, invalid, is_integer

MIXER_FIELDS = frozenset(inspect.signature(Mamba2).parameters) - {
    "d_model", "layer_idx", "device", "dtype", "bimamba", "backend"
}  # fmt: skip
_RULES = dict.fromkeys(
    ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"), COUNT
)
_RULES |= dict.fromkeys(("rms_norm_eps", "rope_theta"), POSITIVE)
_RULES |= dict.fromkeys(("use_alpha_balancing", "cross_attn_use_layer_norm", "cross_attn_use_position_embeddings"), FLAG)


@dataclass(frozen=True)
class VambaConfig:
    """The configuration, by the names of Qwen2-VL and of upstream.

    `mrope_section` splits the head_dim / 2 rotary frequencies among time, height and width. Raises ValueError at construction,
    naming the field, its value and the allowed values; TypeError for an unknown field.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    rms_norm_eps: int | float = 1e-6
    rope_theta: int | float = 1e6
    mrope_section: Sequence[int] = (16, 24, 24)
    use_alpha_balancing: bool = True  # weigh self-attention by alpha, cross-attention by 1 - alpha; False: add both
    cross_attn_use_layer_norm: bool = False  # the layer's input norm replaces the video tokens by their norm
    cross_attn_use_position_embeddings: bool = False  # rotate queries and keys of the cross-attention
    mixer: Mapping[str, Any] = field(default_factory=dict, hash=False)  # keyword arguments of `Mamba2`

    def __new__(cls, *args: Any, **given: Any) -> "VambaConfig":
        """Return the object that __init__ fills; raise TypeError, with the nearest field's name, for an unknown field."""
        check_field_names(cls, given)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, rule in _RULES.items():
            rule.check(name, getattr(self, name))
        heads = self.num_attention_heads
        if heads % self.num_key_value_heads:
            raise invalid("num_key_value_heads", self.num_key_value_heads, f"a divisor of num_attention_heads ({heads})")
        if self.head_dim is None:
            if self.hidden_size % heads:
                raise invalid("hidden_size", self.hidden_size, f"a multiple of num_attention_heads ({heads}), without head_dim")
            object.__setattr__(self, "head_dim", self.hidden_size // heads)
        if not is_integer(self.head_dim, 2) or self.channels % 2:
            raise invalid("head_dim", self.head_dim, "a positive even integer")
        half, section = self.channels // 2, self.mrope_section
        listed = isinstance(section, list | tuple) and len(section) == 3 and all(is_integer(n, 1) for n in section)
        if not listed or sum(section) != half:
            raise invalid("mrope_section", section, f"three positive integers whose sum is head_dim / 2 ({half})")
        object.__setattr__(self, "mrope_section", tuple(section))
        if not isinstance(self.mixer, Mapping):
            raise invalid("mixer", self.mixer, "a mapping of keyword arguments of Mamba2")
        if unknown := sorted(set(self.mixer) - MIXER_FIELDS, key=str):
            raise invalid("mixer", unknown, "keys among " + ", ".join(sorted(MIXER_FIELDS)))
        object.__setattr__(self, "mixer", dict(self.mixer))  # the caller's mapping may change

    @property
    def channels(self) -> int:
        """The channels of an attention head."""
        assert self.head_dim is not None  # derived at construction
        return self.head_dim

    @property
    def cached_values(self) -> int:
        """The numbers that one token of video, or of text, has in a cache: keys and values of all layers."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.channels

    @classmethod
    def qwen2_vl_7b(cls, **overrides: Any) -> "VambaConfig":
        """Return the configuration of the published Vamba on Qwen2-VL-7B, 28 layers."""
        return cls(
            **{
                "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                "num_attention_heads": 28, "num_key_value_heads": 4, **overrides,
            }
        )  # fmt: skip
