"""Small models of video and language with random weights, tokenizers of bytes, and lists of conversations."""

import json
from pathlib import Path
from typing import Any

import torch
from bimba_folders import CONFIG as BIMBA_CONFIG
from bimba_folders import model as bimba
from bimba_folders import upstream_state, write
from byte_tokenizers import byte_tokenizer
from videos import write_video

from fused import Vamba, VambaConfig
from fused.models.vamba.vision import vision_tower

TOWER = {"depth": 1, "embed_dim": 32, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "mrope_section": (2, 1, 1), "mixer": {"headdim": 8, "d_state": 4},
}  # fmt: skip


def write_vamba(path: Path) -> Path:
    """Write a Vamba with its tower and a tokenizer."""
    fast = byte_tokenizer(SPECIAL)
    torch.manual_seed(0)
    net = Vamba(VambaConfig(vocab_size=len(fast), **SIZES))
    net.vision_config, net.visual = TOWER, vision_tower(TOWER)
    net.stop_tokens = (fast.convert_tokens_to_ids("<|im_end|>"),)
    net.save_pretrained(path)
    fast.save_pretrained(path)
    return path


def write_bimba_base(path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write the base model of a BIMBA, without a compressor, and a tokenizer."""
    fast = byte_tokenizer(SPECIAL)
    options = {"vocab_size": len(fast), "eos_token_id": fast.convert_tokens_to_ids("<|im_end|>")}
    state = {name: x.to(dtype) for name, x in upstream_state(bimba(**options)).items() if "compressor" not in name}
    write(path, state, {**BIMBA_CONFIG, **options})
    fast.save_pretrained(path)
    return path


def talk(question: str, answer: str, **more: Any) -> dict[str, Any]:
    """Return an entry of one question and one answer."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **more}


def write_list(path: Path, entries: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(entries))
    return path


def write_data(folder: Path) -> Path:
    """Write two videos and a list of four conversations, one of them without a video; return the list."""
    folder.mkdir(exist_ok=True)
    for name, side in (("dark", 0), ("light", 20)):
        write_video(folder / f"{name}.avi", frames=6, width=48, height=32, side=side)
    entries = [
        talk("<video>\nWhat is it?", "dark", video="dark.avi"),
        talk("<image>\nWhat is it?", "light", video="light.avi"),
        talk("Two and two?", "four"),
        talk("Is it dark?\n<video>", "yes", video="dark.avi"),
    ]
    return write_list(folder / "list.json", entries)
