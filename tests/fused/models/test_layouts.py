"""Weights as trainers and wrappers leave them: a layout is loaded bit for bit, or refused with the reason and the way out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from golden import fill, golden
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from toy_models import TOY

from fused import (
    CheckpointError,
    VideoMamba,
    VideoMambaConfig,
    VideoMambaEncoder,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from fused.models.videomamba.published import Published

Tensors = dict[str, Tensor]


def toy(kind: type = VideoMamba, **overrides: Any) -> Any:
    return kind(VideoMambaConfig(**TOY | overrides))


def trained(kind: type = VideoMamba, scale: float = 1.0, **overrides: Any) -> Tensors:
    return {name: scale * value for name, value in golden(toy(kind, **overrides)).state_dict().items()}


def assert_loaded(model: nn.Module, weights: Tensors) -> None:
    loaded = model.state_dict()
    assert loaded.keys() == weights.keys() and all(torch.equal(value, weights[name]) for name, value in loaded.items())


def begin(prefix: str, weights: Tensors) -> Tensors:
    return {prefix + name: value for name, value in weights.items()}


def inside(wrapper: str, weights: Tensors) -> Tensors:
    """The name of a wrapped module put into the names of its parameters, for every layer and for its mixer."""
    return {name.replace(".mixer.", f".{wrapper}.mixer.{wrapper}."): value for name, value in weights.items()}


NAMES: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "Lightning": (lambda w: begin("model.", w), "'model.'"),
    "Lightning-deeper": (lambda w: begin("model.net.", w), "'model.net.'"),
    "Lightning-compiled": (lambda w: begin("model._orig_mod.", w), "'model.'"),
    "DDP-of-Lightning": (lambda w: begin("module.model.", w), "'module.', without 'model.'"),
    "FSDP": (lambda w: begin("_fsdp_wrapped_module.", inside("_fsdp_wrapped_module", w)), "'_fsdp_wrapped_module.'"),
    "compiled-blocks": (lambda w: inside("_orig_mod", w), "'_orig_mod.'"),
    "FSDP-of-checkpointed": (
        lambda w: inside("_fsdp_wrapped_module._checkpoint_wrapped_module", w), "without '_checkpoint_wrapped_module.'",
    ),
    "DDP-of-compiled": (lambda w: begin("module._orig_mod.", w), "without 'module.'"),
    "net": (lambda w: begin("net.", w), "'net.'"),
    "another-word": (lambda w: begin("my_video_net.", w), "'my_video_net.'"),
    "a-head-beside": (
        lambda w: {n if n.startswith("head") else f"model.{n}": value for n, value in w.items()}, "'model.'",
    ),
    "backbone-and-head": (
        lambda w: {("model." if n.startswith("head") else "model.backbone.") + n: value for n, value in w.items()}, "'model.'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", NAMES)
@pytest.mark.parametrize("container", [None, "state_dict", "model_state_dict", "model_state"])
def test_prefixes_and_names_of_wrappers(layout: str, container: str | None) -> None:
    change, words = NAMES[layout]
    weights, model = trained(), toy()
    changed = change(weights)
    assert changed.keys() != weights.keys()
    report = load_checkpoint(model, {container: changed, "epoch": 3} if container else changed)
    assert_loaded(model, weights)
    assert sorted(report.loaded) == sorted(weights) and not report.initial
    assert words in report.layout and set(report.dropped) == ({"epoch"} if container else set())


@pytest.mark.parametrize("kind", [VideoMamba, VideoMambaEncoder])
def test_a_lightning_file_with_a_loss_and_metrics(kind: type) -> None:
    """Entries that are not under the network's prefix are reported; a part that the model lacks is left out as ever."""
    weights, model = trained(kind), toy(kind)
    others = {"criterion.weight": torch.ones(5), "val_top1.total": torch.ones(()), "model.text_encoder.bert.x": torch.ones(2)}
    report = load_checkpoint(model, {"state_dict": begin("model.", weights) | others, "hyper_parameters": {}})
    assert_loaded(model, weights)
    assert report.dropped["criterion.weight"] == "its name does not begin with 'model.'"
    assert report.dropped["text_encoder.bert.x"] == "of another network" and "val_top1.total" in report.dropped
    left = {**weights, "layers.0.mixer.gamma": torch.ones(32)}
    with pytest.raises(CheckpointError, match=r"not in the model: layers.0.mixer.gamma"):
        load_checkpoint(model, begin("net.", left))


def test_student_and_teacher_under_one_prefix() -> None:
    model, weights = toy(), trained()
    report = load_checkpoint(model, begin("model.student.", weights) | begin("model.teacher.", trained(scale=2)))
    assert_loaded(model, weights)
    assert set(report.dropped.values()) == {"of another network"}


def test_several_networks_are_named() -> None:
    weights, model = trained(), toy()
    with pytest.raises(CheckpointError, match="several networks in this.*'left.', 'right.*pass the state_dict of one"):
        load_checkpoint(model, begin("left.", weights) | begin("right.", weights))
    with pytest.raises(CheckpointError, match="not in the model: right.cls_token"):
        load_checkpoint(model, weights | begin("right.", weights))


def test_a_prefix_of_another_network_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"all its names begin with 'vit\.'; a VideoMamba's with 'cls_token'"):
        load_checkpoint(toy(), {"vit.blocks.0.weight": torch.ones(2), "vit.cls_token": torch.ones(1, 1, 32)})
    with pytest.raises(CheckpointError, match=r"all its names begin with 'blocks', 'stem'"):
        load_checkpoint(toy(), {"blocks.0.weight": torch.ones(2), "stem.weight": torch.ones(2)}, strict=False)
    with pytest.raises(CheckpointError, match=r"'weights' holds tensors: if these .* pass checkpoint\['weights'\]"):
        load_checkpoint(toy(), {"weights": trained(), "epoch": 2})


AVERAGES: dict[str, Callable[[Tensors, Tensors], dict[str, Any]]] = {
    "upstream": lambda w, ema: {"model": w, "model_ema": ema, "epoch": 3},
    "upstream-DDP": lambda w, ema: {"model": begin("module.", w), "model_ema": begin("module.", ema)},
    "torchvision": lambda w, ema: {"model": w, "model_ema": {"n_averaged": torch.tensor(7), **begin("module.", ema)}},
    "timm": lambda w, ema: {"state_dict": w, "state_dict_ema": ema, "arch": "x"},
    "deepspeed": lambda w, ema: {"module": w, "model_ema": ema},
    "in-one-container": lambda w, ema: {"state_dict": {"model": w, "model_ema": ema}},
    "Lightning": lambda w, ema: {"state_dict": begin("model.", w) | begin("ema_model.", ema)},
    "Lightning-AveragedModel": lambda w, ema: (
        begin("model.", w) | begin("ema.module.", ema) | {"ema.n_averaged": torch.ones(())}
    ),
    "ema-pytorch": lambda w, ema: begin("online_model.", w) | begin("ema_model.", ema) | {"step": torch.ones(())},
    "ema-pytorch-of-a-trainer": lambda w, ema: {"model": w, "ema": begin("ema_model.", ema) | {"step": torch.ones(())}},
}  # fmt: skip


@pytest.mark.parametrize("layout", AVERAGES)
def test_averaged_weights(layout: str, tmp_path: Any) -> None:
    weights, ema = trained(), trained(scale=0.5)
    torch.save(AVERAGES[layout](weights, ema), tmp_path / "last.pth")
    model, average = toy(), toy()
    report = load_checkpoint(model, tmp_path / "last.pth")
    assert_loaded(model, weights)
    assert "averaged weights, which='ema' loads them" in report.dropped.values()
    report = load_checkpoint(average, tmp_path / "last.pth", which="ema")
    assert_loaded(average, ema)
    assert not report.initial and "ema" in report.layout


@pytest.mark.parametrize("which", ["model", "ema"])
def test_an_averaged_model(which: str) -> None:
    """Its state_dict is one set of weights, with a count beside it: both words mean it."""
    averaged = AveragedModel(golden(toy()), multi_avg_fn=get_ema_multi_avg_fn(0.5))
    averaged.update_parameters(toy())
    averaged.update_parameters(toy())
    model = toy()
    report = load_checkpoint(model, averaged.state_dict(), which=which)
    assert_loaded(model, averaged.module.state_dict())
    assert report.dropped == {"n_averaged": "the number of averaged models"}


def test_averages_that_are_not_there(tmp_path: Any) -> None:
    weights, model = trained(), toy()
    save_checkpoint({"model": weights, "epoch": 3}, tmp_path / "last.pth")
    with pytest.raises(CheckpointError, match="last.pth: which is 'ema', but there are no .*it holds 'model', 'epoch'"):
        load_checkpoint(model, tmp_path / "last.pth", which="ema")
    with pytest.raises(CheckpointError, match="only averaged weights in this checkpoint; which='ema' loads them"):
        load_checkpoint(model, begin("ema_model.", weights) | {"initted": torch.ones(()), "step": torch.ones(())})
    with pytest.raises(CheckpointError, match="'model_ema' holds averaged weights, which='ema' loads them"):
        load_checkpoint(model, {"model_ema": weights})
    with pytest.raises(ValueError, match="which is 'average'; allowed: one of 'model', 'ema'"):
        load_checkpoint(model, weights, which="average")


def test_averages_by_from_pretrained(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    ema = trained(scale=0.5)
    torch.save({"model": trained(), "model_ema": ema}, tmp_path / "toy.pth")
    entry = Published("toy.pth", "VideoMamba", VideoMambaConfig(**TOY))
    monkeypatch.setattr("fused.models.videomamba.hub.PRETRAINED", {"toy": entry})
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_, **__: str(tmp_path / "toy.pth"))
    assert_loaded(VideoMamba.from_pretrained("toy", which="ema"), ema)
    assert_loaded(VideoMamba.from_pretrained("toy"), trained())
    toy().save_pretrained(tmp_path / "folder")
    with pytest.raises(CheckpointError, match="model.safetensors: which is 'ema', but there are no averaged weights"):
        VideoMamba.from_pretrained(tmp_path / "folder", which="ema")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (lambda p: toy(), r"is a VideoMamba; .*load_checkpoint\(model, other_model.state_dict\(\)\)"),
        (lambda p: nn.Linear(2, 2), r"is a Linear; .*other_model.state_dict\(\)"),
        (lambda p: None, "is a NoneType; allowed: the path of a file, or a state_dict$"),
        (lambda p: [torch.ones(2)], "is a list"),
        (lambda p: torch.ones(2), "is a Tensor"),
        (lambda p: (p / "open").open("wb"), "is a BufferedWriter"),
        (lambda p: b"last.pth", "is a bytes"),
        (lambda p: 3, "is a int"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_is_no_checkpoint(given: Callable[[Any], Any], says: str, tmp_path: Any) -> None:
    with pytest.raises(TypeError, match=f"^path_or_state_dict {says}"):
        load_checkpoint(toy(), given(tmp_path))


@pytest.mark.usefixtures("unchecked")
def test_other_arguments_of_a_wrong_type(tmp_path: Any) -> None:
    for wrong in (None, 3, b"x"):
        with pytest.raises(TypeError, match="path is a .*; allowed: the path of a file"):
            read_checkpoint(wrong)  # type: ignore[arg-type]
    for reads in (read_checkpoint, lambda path: load_checkpoint(toy(), path)):
        with pytest.raises(CheckpointError, match="is a folder; allowed: a file. from_pretrained reads a folder"):
            reads(tmp_path)
    with pytest.raises(TypeError, match="model_or_state_dict is a list; allowed: a model, or a dictionary"):
        save_checkpoint([torch.ones(2)], tmp_path / "x.pth")  # type: ignore[arg-type]
    for grid in (14, (2,), (2.0, 2), (0, 4), "22"):
        with pytest.raises(ValueError, match=r"grid is .*; allowed: \(rows, columns\) of patches, or None"):
            load_checkpoint(toy(), trained(), grid=grid)  # type: ignore[arg-type]


def test_models_in_wrappers() -> None:
    """A compiled model has the same parameters; other wrappers, and a model without memory, are named."""
    weights, model = trained(), toy()
    load_checkpoint(torch.compile(model, backend="eager"), weights)
    assert_loaded(model, weights)
    with pytest.raises(TypeError, match=r"got DataParallel; pass its \.module$"):
        load_checkpoint(nn.DataParallel(model), weights)
    with torch.device("meta"):
        empty = toy()
    with pytest.raises(CheckpointError, match=r"model is on the meta device.*model.to_empty\(device=...\) first"):
        load_checkpoint(empty, weights)
    load_checkpoint(empty.to_empty(device="cpu"), weights)
    assert_loaded(empty, weights)


def quantised_by_pytorch(weights: Tensors) -> dict[str, Any]:
    name = "layers.1.mixer.in_proj.weight"
    return weights | {name: torch.quantize_per_tensor(weights[name], 0.01, 0, torch.qint8)}


def changed(name: str, value: Callable[[Tensor], Any]) -> Callable[[Tensors], dict[str, Any]]:
    return lambda weights: weights | {name: value(weights[name])}


def renamed(old: str, *new: str) -> Callable[[Tensors], dict[str, Any]]:
    return lambda weights: {n: v for n, v in weights.items() if n != old} | dict.fromkeys(new, weights[old])


class Packed(Tensor):
    """A tensor of a subclass, as torchao's quantised ones and PyTorch's sharded ones are."""


IN_PROJ = "layers.0.mixer.in_proj.weight"
FORMS: dict[str, tuple[Callable[[Tensors], dict[str, Any]], str]] = {
    "qint8": (quantised_by_pytorch, r"layers.1.mixer.in_proj.weight is a quantised tensor \(torch.qint8\); allowed"),
    "int8": (changed(IN_PROJ, lambda w: w.to(torch.int8)), f"{IN_PROJ} is torch.int8, quantised or no weight at all"),
    "bool": (changed("head.bias", lambda w: w > 0), "head.bias is torch.bool"),
    "complex": (changed("cls_token", lambda w: w + 0j), "cls_token is torch.complex64"),
    "subclass": (changed(IN_PROJ, lambda w: w.as_subclass(Packed)), f"{IN_PROJ} is a Packed"),
    "sparse": (changed(IN_PROJ, lambda w: w.to_sparse()), "is sparse"),
    "meta": (changed(IN_PROJ, lambda w: w.to("meta")), "is on the meta device, it has no values"),
    "scale-beside": (
        lambda w: w | {"layers.0.mixer.in_proj.weight_scale": torch.ones(1)},
        "quantised weights, such as layers.0.mixer.in_proj.weight_scale; load the weights from before",
    ),
    "bitsandbytes": (
        lambda w: w | {IN_PROJ + ".absmax": torch.ones(3), IN_PROJ + ".quant_map": torch.ones(16)}, "quantised weights",
    ),
    "gptq": (renamed(IN_PROJ, "layers.0.mixer.in_proj.qweight", "layers.0.mixer.in_proj.qzeros"), "quantised weights"),
    "peft": (
        renamed(IN_PROJ, *(f"layers.0.mixer.in_proj.{n}.weight" for n in ("base_layer", "lora_A.default", "lora_B.default"))),
        r"weights with adapters beside them, such as layers.0.*merge_and_unload",
    ),
    "parametrised": (
        renamed(IN_PROJ, "layers.0.mixer.in_proj.parametrizations.weight.original"), "parametrised weights.*remove_parametriz",
    ),
    "FSDP-flat": (lambda w: w | {"layers.0._fsdp_wrapped_module._flat_param": torch.ones(9)}, "flat parameters of FSDP.*FULL"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_forms_that_cannot_be_read(form: str, strict: bool) -> None:
    """Refused also without `strict`: what would be loaded is no weight, or most of the weights would be missing."""
    harm, says = FORMS[form]
    model = golden(toy())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"^state_dict(:| holds) .*{says}"):
        load_checkpoint(model, harm(trained(scale=2)), strict=strict)
    assert_loaded(model, before)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_a_model_that_pytorch_quantised() -> None:
    quantised = pytest.importorskip("torch.ao.quantization", reason="this PyTorch has no torch.ao.quantization")
    if torch.backends.quantized.engine == "none":
        pytest.skip("this PyTorch has no kernels for quantised layers")
    weights = quantised.quantize_dynamic(toy(), {nn.Linear}, dtype=torch.qint8).state_dict()
    with pytest.raises(CheckpointError, match="quantised weights, such as layers.0.mixer.in_proj"):
        load_checkpoint(toy(), weights)
    with pytest.raises(CheckpointError, match="quantised weights"):
        load_checkpoint(toy(), begin("model.", weights), strict=False)


def test_a_peft_file_under_its_own_prefix() -> None:
    weights = renamed(IN_PROJ, *(f"layers.0.mixer.in_proj.{n}.weight" for n in ("base_layer", "lora_A.default")))(trained())
    with pytest.raises(CheckpointError, match="weights with adapters beside them, such as layers.0.mixer.in_proj.base_layer"):
        load_checkpoint(toy(), begin("base_model.model.", weights))


def test_a_loaded_model_gives_what_the_trained_one_gives() -> None:
    trained_model, model = golden(toy()), toy().eval()
    load_checkpoint(model, {"state_dict": begin("model._orig_mod.", trained_model.state_dict())})
    clip = fill(2, 3, 4, 32, 32, phase=7)
    assert torch.equal(model(clip), trained_model(clip))
