"""Small video-text models for tests, their vocabulary, and a file of one in the published layout."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused import RetrievalConfig, VideoMambaConfig, VideoTextRetrieval

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a the seven six moves left right up down quickly ##s move black white".split()
VIDEO = {"embed_dim": 32, "depth": 1, "img_size": 32, "num_frames": 2, "clip_norm_type": "none", "clip_output_dim": 8}
BERT = {
    "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 96,
    "max_position_embeddings": 16, "fusion_layer": 2, "embed_dim": 16,
}  # fmt: skip


def vocabulary(folder: Path, words: list[str] = WORDS) -> Path:
    """Write a vocabulary, and return its path."""
    path = folder / "words.txt"
    path.write_text("".join(word + "\n" for word in words))
    return path


def config(**fields: Any) -> RetrievalConfig:
    """Return a small configuration."""
    return RetrievalConfig(**{"video": VideoMambaConfig(**VIDEO), "vocab_size": len(WORDS), **BERT, **fields})


def model(seed: int = 0, **fields: Any) -> VideoTextRetrieval:
    """Return a small model in eval mode, no parameter of which has its initial value."""
    torch.manual_seed(seed)
    made = VideoTextRetrieval(config(**fields)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    return made


def published(made: VideoTextRetrieval) -> dict[str, Any]:
    """Return a model's weights as upstream's trainer stores them."""
    weights: dict[str, Any] = {name: value.clone() for name, value in made.state_dict().items()}
    head = "text_encoder.cls.predictions."
    weights[head + "decoder.weight"] = weights["text_encoder.bert.embeddings.word_embeddings.weight"]
    weights[head + "decoder.bias"] = weights[head + "bias"]
    weights["text_encoder.bert.embeddings.position_ids"] = torch.arange(BERT["max_position_embeddings"])[None]
    weights["clip_teacher.conv1.weight"] = torch.rand(4, 3, 2, 2)
    return {"model": weights, "optimizer": {}, "epoch": 9}


def same_bits(one: VideoTextRetrieval, other: VideoTextRetrieval) -> bool:
    """Return whether two models have the same tensors, bit for bit."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def clips(count: int, seed: int = 0) -> Tensor:
    """Return random clips of the small model."""
    return torch.randn(count, 3, 2, 32, 32, generator=torch.Generator().manual_seed(seed))
