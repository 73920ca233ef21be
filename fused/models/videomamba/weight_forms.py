"""Forms of weights that cannot be copied into a model: quantised, adapted, parametrised, in shards, without values."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fused.io.checkpoint_file import CheckpointError

# by names that only such weights have: what they are, and the way out
FOREIGN_NAMES = {
    r"\.(_packed_params\b.*|scales?|zero_point|q(weight|zeros|scales)|g_idx|weight_scale\w*|SCB|weight_format"
    r"|weight\.(\w*absmax|\w*quant_\w+.*))$": (
        "quantised weights", "load the weights from before the quantisation"
    ),
    r"\.(base_layer|lora_\w+|modules_to_save)\.": (
        "weights with adapters beside them", "merge these first, with peft by model.merge_and_unload()"
    ),
    r"\.parametrizations\.": (
        "parametrised weights", "call torch.nn.utils.parametrize.remove_parametrizations before saving"
    ),
    r"(^|\.)_?flat_param(_\d+)?$": (
        "flat parameters of FSDP", "save with StateDictType.FULL_STATE_DICT"
    ),
}  # fmt: skip


def check_forms(source: str, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError for tensors of `source` in a form that cannot be copied into `parameters`."""
    for pattern, (form, way_out) in FOREIGN_NAMES.items():
        if found := [name for name in tensors if name not in parameters and re.search(pattern, name)]:
            raise CheckpointError(f"{source} holds {form}, such as {found[0]}; {way_out}")
    for name in tensors.keys() & parameters.keys():
        if wrong := _wrong_form(tensors[name]):
            raise CheckpointError(f"{source}: {name} is {wrong}; allowed: a dense tensor of floating-point numbers")


def _wrong_form(value: Tensor) -> str | None:
    """Return in words what a tensor is whose numbers cannot be copied; None for one whose numbers can."""
    if value.is_quantized:
        return f"a quantised tensor ({value.dtype})"
    if type(value) not in (Tensor, nn.Parameter):
        return f"a {type(value).__name__} (quantised, or a shard of a tensor)"
    if value.device.type == "meta":
        return "on the meta device, it has no values"
    if value.layout != torch.strided:
        return f"sparse ({value.layout})"
    if not value.is_floating_point():
        return f"{value.dtype}, quantised or no weight at all"
    return None
