"""The timed calls of Vamba: a video's prefill from features, a decoded token, a training step."""

from typing import Any

import torch
from torch import Tensor

import fused
from fused.models.vamba.generate import DecodeStep
from harness.baselines.vamba_upstream import UpstreamVamba
from harness.bench.clock import Call
from harness.bench.workloads import OnDevice
from harness.fixtures import functional_modules as modules
from harness.records.speed import Entry, Point
from harness.subjects import qwen2

TEXT = 64  # tokens that precede a decoded one
ROOM = 16


def fields(point: Point) -> dict[str, Any]:
    """Return the configuration's fields: those of the published model at its width, else small ones."""
    D, layers = point["D"], point["K"]
    if D == 3584:
        sizes = fused.VambaConfig.qwen2_vl_7b()
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        return {name: getattr(sizes, name) for name in names} | {"num_hidden_layers": layers}
    return {
        "vocab_size": 64, "hidden_size": D, "intermediate_size": 2 * D, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "mrope_section": (D // 8 - 2, 1, 1), "mixer": {"headdim": 16, "d_state": 16},
    }  # fmt: skip


def make(point: Point, entry: Entry, device: str) -> Call:
    """Return the call of an entry at a point: with one text token a decoded one, in mode "train" a step, else the prefill."""
    dtype = getattr(torch, point.dtype)
    with torch.device("meta"):
        model = _model(point, entry)
    case = OnDevice("vamba", point.dims, (), point.dtype, device=device)
    with torch.device(device):
        values = {n: v.to(dtype) for n, v in modules.parameters(model, case, 0).items()} if point["K"] < 4 else None
    _give(model, values, dtype, device)
    with torch.device(device):
        text = torch.randn(point["B"], point["L"], point["D"], dtype=dtype)
        video = torch.randn(point["B"], point["V"], point["D"], dtype=dtype)
        ids = torch.randint(0, model.config.vocab_size, (point["B"], TEXT))
    if entry.subject == "qwen2":
        tokens = torch.cat((video, text), dim=1)
        if point.mode == "train":
            return _training(model, lambda: model(inputs_embeds=tokens).logits)
        return Call(torch.no_grad()(lambda: model(inputs_embeds=tokens, use_cache=True).cache))
    if point.mode == "train":
        return _training(model, lambda: model(inputs_embeds=text, video=video).logits)
    is_upstream = isinstance(model, UpstreamVamba)
    if point["L"] > 1:
        return Call(torch.no_grad()(lambda: _prefill(model, text, video, whole=is_upstream)))
    with torch.no_grad():
        cache = model(ids, cache=model.encode_video(video), use_cache=True).cache
        step = DecodeStep(model, cache, ROOM, graph=point.way == "graph")
        step(ids[:, 0])
    return Call(torch.no_grad()(step.work))


def _model(point: Point, entry: Entry) -> Any:
    if entry.subject == "qwen2":
        return qwen2.stock(fused, **fields(point))
    kind = UpstreamVamba if entry.implementation == "upstream" else fused.Vamba
    backend = entry.implementation.removeprefix("fused:") if kind is fused.Vamba else "auto"
    return kind(fused.VambaConfig(**fields(point)), backend)


def _give(model: Any, values: dict[str, Tensor] | None, dtype: torch.dtype, device: str) -> None:
    """Give a model on the meta device parameters: `values`, or layer by layer those of a fresh model."""
    if values is not None:
        model.load_state_dict(values, assign=True)
        return
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, p in list(model.named_parameters()):
            new = torch.empty(p.shape, dtype=dtype, device=device)
            leaf = name.rpartition(".")[2]
            if leaf == "A_log":
                new.copy_((1 + torch.arange(len(new), device=device) % 16).log())
            elif leaf == "dt_bias":
                new.fill_(-4)
            elif leaf == "alpha":
                new.fill_(0.5)
            elif new.dim() == 1:
                new.fill_(float(leaf != "bias"))
            else:
                new.normal_(0, (new.numel() / len(new)) ** -0.5, generator=generator)
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, torch.nn.Parameter(new))


def _prefill(model: Any, text: Tensor, video: Tensor, whole: bool) -> Any:
    """Return the cache after a video and a text: in chunks, or as upstream at once."""
    if whole:
        return model(inputs_embeds=text, video=video, use_cache=True).cache
    return model(inputs_embeds=text, cache=model.encode_video(video), use_cache=True).cache


def _training(model: Any, forward: Any) -> Call:
    def step() -> None:
        forward().float().square().mean().backward()

    return Call(step, lambda: model.zero_grad(set_to_none=True))
