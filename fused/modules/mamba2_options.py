"""Rules for the options of `Mamba2`, each by itself."""

from collections.abc import Mapping
from typing import Any

from fused.rules import COUNT, COUNT_OR_0, FLAG, POSITIVE, POSITIVE_OR_0, Rule, invalid, is_number


def _is_range(value: object) -> bool:
    """Return whether `value` is a pair of positive numbers that ascend."""
    pair = value if isinstance(value, tuple | list) and len(value) == 2 else (0, 0)
    return all(is_number(x, lambda x: 0 < x < float("inf")) for x in pair) and pair[0] <= pair[1]


RULES: dict[str, Rule] = {
    **dict.fromkeys(("d_model", "d_state", "d_conv", "expand", "headdim", "ngroups", "chunk_size"), COUNT),
    **dict.fromkeys(("dt_min", "dt_max", "dt_init_floor"), POSITIVE),
    **dict.fromkeys(("D_has_hdim", "rmsnorm", "norm_before_gate", "bias", "conv_bias", "use_mem_eff_path", "bimamba"), FLAG),
    "d_ssm": COUNT.optional(), "layer_idx": COUNT_OR_0.optional(), "conv_init": POSITIVE_OR_0.optional(),
    "A_init_range": Rule(_is_range, "two positive numbers (low, high), low <= high"),
}  # fmt: skip


def check_options(given: Mapping[str, Any]) -> None:
    """Raise ValueError, with the option's name, its value and what is allowed, for an option that is out of range."""
    for name, rule in RULES.items():
        rule.check(name, given[name])
    if given["dt_min"] > given["dt_max"]:
        raise invalid("dt_min", given["dt_min"], f"up to dt_max ({given['dt_max']})")
