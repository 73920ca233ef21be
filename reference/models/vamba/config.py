"""The configuration of a Vamba: the sizes of Qwen2-VL's decoder, and the keywords of the Mamba-2 mixers."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from reference.modules.mamba2 import Mamba2

MIXER_FIELDS = frozenset(inspect.signature(Mamba2).parameters) - {"d_model", "layer_idx", "device", "dtype", "bimamba"}
COUNTS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
FLAGS = ("use_alpha_balancing", "cross_attn_use_layer_norm", "cross_attn_use_position_embeddings")


@dataclass(frozen=True)
class VambaConfig:
    """The configuration; names are those of Qwen2-VL and of upstream.

    `mrope_section` splits the head_dim / 2 rotary frequencies among the axes time, height and width. `mixer` holds keywords of
    `Mamba2`. Construction raises ValueError, naming the field, its value and the allowed values.
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
    use_alpha_balancing: bool = True  # weigh self-attention by alpha and cross-attention by 1 - alpha; False: add both
    cross_attn_use_layer_norm: bool = False  # the layer's input norm replaces the video tokens by their norm
    cross_attn_use_position_embeddings: bool = False  # rotate queries and keys of the cross-attention
    mixer: Mapping[str, Any] = field(default_factory=dict, hash=False)  # keyword arguments of `Mamba2`

    def __post_init__(self) -> None:
        for name in COUNTS:
            _require(_is_count(getattr(self, name)), name, getattr(self, name), "a positive integer")
        heads, kv = self.num_attention_heads, self.num_key_value_heads
        _require(heads % kv == 0, "num_key_value_heads", kv, f"a divisor of num_attention_heads ({heads})")
        if self.head_dim is None:
            _require(self.hidden_size % heads == 0, "hidden_size", self.hidden_size,
                     f"a multiple of num_attention_heads ({heads}), or head_dim is given")  # fmt: skip
            object.__setattr__(self, "head_dim", self.hidden_size // heads)
        _require(_is_count(self.head_dim) and self.channels % 2 == 0, "head_dim", self.head_dim, "a positive even integer")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            _require(isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < float("inf"), name, value,
                     "a positive number")  # fmt: skip
        given = self.mrope_section
        half = self.channels // 2
        fits = isinstance(given, Sequence) and len(given) == 3 and all(_is_count(n) for n in given) and sum(given) == half
        _require(fits, "mrope_section", given, f"three positive integers whose sum is head_dim / 2 ({half})")
        object.__setattr__(self, "mrope_section", tuple(given))
        for name in FLAGS:
            _require(getattr(self, name) in (True, False), name, getattr(self, name), "True or False")
        _require(isinstance(self.mixer, Mapping), "mixer", self.mixer, "a mapping of keyword arguments of Mamba2")
        unknown = set(self.mixer) - MIXER_FIELDS
        _require(not unknown, "mixer", sorted(unknown, key=str), "keys among " + ", ".join(sorted(MIXER_FIELDS)))
        object.__setattr__(self, "mixer", dict(self.mixer))

    @property
    def channels(self) -> int:
        """The channels of an attention head."""
        assert self.head_dim is not None  # derived at construction
        return self.head_dim

    @classmethod
    def qwen2_vl_7b(cls, **overrides: Any) -> "VambaConfig":
        """Return the configuration of the published Vamba on Qwen2-VL-7B, 28 layers."""
        sizes: dict[str, Any] = {
            "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4,
        }  # fmt: skip
        return cls(**sizes | overrides)


def _is_count(value: object) -> bool:
    """Return whether the value is a positive integer; True is not."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    """Raise ValueError unless `holds`, naming the field, its value and the allowed values."""
    if not holds:
        raise ValueError(f"{name} is {value!r}; allowed: {allowed}")
