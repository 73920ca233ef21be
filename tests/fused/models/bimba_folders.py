"""Small BIMBA models of random weights, and their folders in upstream's layout."""

import json

import torch
from safetensors.torch import save_file

from fused import Bimba

CONFIG = {
    "model_type": "llava_qwen", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 512, "mm_spatial_pool_mode": "bilinear",
    "vision_config": {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 70,
        "patch_size": 14,
    },
}  # fmt: skip
UPSTREAM = {"vision_tower.": "model.vision_tower.vision_tower.vision_model.", "language_model.": ""}


def model(**options):
    torch.manual_seed(0)
    return Bimba({**CONFIG, **options}).eval()


def upstream_key(name):
    for ours, theirs in UPSTREAM.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return "model." + name


def upstream_state(bimba):
    return {upstream_key(name): x.clone().contiguous() for name, x in bimba.state_dict().items()}


def write(folder, state, config=CONFIG, file="model.safetensors"):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / file)
    return folder


def write_adapted(path, **options):
    """Write the base model and its adapters below a folder; return (the model with adapters merged, the adapters' folder)."""
    trained, base = model(**options), upstream_state(model(**options))
    with torch.no_grad():
        for p in (*trained.mm_projector.parameters(), *trained.compressor.parameters()):
            p.add_(0.01 * torch.randn_like(p))
    state, adapters = upstream_state(trained), {}
    for layer in range(2):
        for name in ("q_proj", "v_proj"):
            key = f"model.layers.{layer}.self_attn.{name}"
            A, B = torch.randn(2, 32), torch.randn(state[key + ".weight"].shape[0], 2)
            adapters |= {f"base_model.model.{key}.lora_{k}.weight": x for k, x in (("A", A), ("B", B))}
            with torch.no_grad():
                trained.get_parameter(f"language_model.{key}.weight").add_(8 / 2 * B @ A)
    write(path / "base", {k: x for k, x in base.items() if "compressor" not in k}, {**CONFIG, **options})
    folder = path / "adapters"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**CONFIG, "compressor_type": "mamba", "vocab_size": 7}))
    lora = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "base_model_name_or_path": str(path / "base")}
    (folder / "adapter_config.json").write_text(json.dumps(lora))
    save_file(adapters, folder / "adapter_model.safetensors")
    beside = {k: x for k, x in state.items() if "compressor" in k or "mm_projector" in k}
    torch.save({f"base_model.model.{k}": x for k, x in beside.items()}, folder / "non_lora_trainables.bin")
    return trained, folder
