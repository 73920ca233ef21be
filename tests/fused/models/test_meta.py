"""Models and clips on the meta device: outputs have shapes and no values, at no cost; what needs values says so."""

from typing import Any

import pytest
import torch
from torch import Tensor
from toy_models import TOY

from fused import FrameStream, VideoMamba, VideoMambaConfig, VideoMambaEncoder

CAUSAL = {"bimamba": False, "readout": "mean", "pool_type": "avg"}
KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    "classifier": (VideoMamba, {}),
    "image": (VideoMamba, {"num_frames": None}),
    "distilled": (VideoMamba, {"distill_dim": 9}),
    "causal": (VideoMamba, CAUSAL),
    "tokens": (VideoMamba, {"readout": "tokens", "kernel_size": 2, "stride": 8}),
    "both-orders": (VideoMamba, {"scan_order": "both", "rms_norm": False, "fused_add_norm": False}),
    "encoder": (VideoMambaEncoder, {}),
    "encoder-temporal": (VideoMambaEncoder, {"scan_order": "temporal", "add_pool_norm": False, "clip_return_layer": 2}),
    "encoder-causal": (VideoMambaEncoder, CAUSAL),
}


def build(name: str, device: str) -> Any:
    kind, overrides = KINDS[name]
    with torch.device(device):
        return kind(VideoMambaConfig(**TOY | overrides))


def clip_for(model: Any, device: str, frames: int = 4) -> Tensor:
    return torch.zeros(2, 3, *([frames] if model.config.num_frames else []), 32, 32, device=device)


def shapes(output: Any) -> Any:
    if isinstance(output, Tensor):
        return tuple(output.shape), output.dtype
    return None if output is None else [shapes(x) for x in output]


def on_meta(output: Any) -> bool:
    return output.is_meta if isinstance(output, Tensor) else all(x is None or on_meta(x) for x in output)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_shapes_are_those_of_the_cpu(name: str, train: bool) -> None:
    meta, real = build(name, "meta").train(train), build(name, "cpu").train(train)
    output = meta(clip_for(meta, "meta"))
    assert on_meta(output) and shapes(output) == shapes(real(clip_for(real, "cpu")))
    if train:
        first = output if isinstance(output, Tensor) else output[0]
        first.sum().backward()
        assert meta.cls_token.grad.is_meta


@pytest.mark.parametrize("name", ["classifier", "distilled", "causal", "tokens", "encoder"])
def test_in_chunks(name: str) -> None:
    meta, real = build(name, "meta").eval(), build(name, "cpu").eval()
    for how in ({}, {"temporal_pos_total": 8}):
        frames = 8 if how else 4
        output = meta.forward_chunked(clip_for(meta, "meta", frames), chunk_frames=2, **how)
        wanted = real.forward_chunked(clip_for(real, "cpu", frames), chunk_frames=2, **how)
        assert on_meta(output) and shapes(output) == shapes(wanted)
    pieces = list(meta.forward_approximate(clip_for(meta, "meta"), chunk_frames=2, look_ahead=2))
    assert all(map(on_meta, pieces)) and sum(x.shape[1] for x in pieces) == 1 + meta.config.tubelets * meta.config.patches


def test_a_mask_keeps_its_values() -> None:
    model, mask = build("encoder", "meta"), torch.zeros(2, 17, dtype=torch.bool)
    mask[:, 2::2] = True
    output = model(clip_for(model, "meta"), mask)
    assert on_meta(output) and output.clip.shape == (1, 2, 9, 12)
    with pytest.raises(ValueError, match="mask is on the meta device.*pass it on the CPU"):
        model(clip_for(model, "meta"), mask.to("meta"))


def test_a_stream_has_memory() -> None:
    with pytest.raises(ValueError, match="model is on the meta device, where a stream has no memory"):
        FrameStream(build("causal", "meta").eval())


def test_another_dtype_is_named_as_elsewhere() -> None:
    model = build("classifier", "meta")
    with pytest.raises(TypeError, match="clip has dtype torch.float64, parameters torch.float32"):
        model(clip_for(model, "meta").double())


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("clip", "parameters"), [("meta", "cpu"), ("cpu", "meta")])
def test_another_device_than_the_models(name: str, clip: str, parameters: str) -> None:
    model = build(name, parameters)
    with pytest.raises(ValueError, match=f"clip is on {clip}, parameters on {parameters}; allowed: the same device"):
        model(clip_for(model, clip))
