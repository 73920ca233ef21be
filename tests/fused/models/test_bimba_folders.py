"""Folders of a BIMBA's adapters that do not fit their base model or are broken, and the ways in which they may be written."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

pytest.importorskip("transformers", reason="the towers are models of transformers")

from bimba_folders import CONFIG, model, upstream_state, write, write_adapted  # noqa: E402

from fused import Bimba, CheckpointError  # noqa: E402

ADAPTERS, TRAINED = "adapters/adapter_model.safetensors", "adapters/non_lora_trainables.bin"
V_OF_1 = "base_model.model.model.layers.1.self_attn.v_proj"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """Return a trained model, its adapters merged, and the folder of its base model and its adapters."""
    path = tmp_path_factory.mktemp("bimba")
    return write_adapted(path)[0], path


@pytest.fixture
def folder(written: tuple[nn.Module, Path], tmp_path: Path) -> Path:
    """Return a copy of base model and adapters."""
    path = tmp_path / "copy"
    shutil.copytree(written[1], path)
    set_json(path / "adapters/adapter_config.json", base_model_name_or_path=str(path / "base"))
    return path


def set_json(file: Path, **values: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    content = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def change(file: Path, edit: Callable[[str, Tensor], Mapping[str, Tensor]]) -> None:
    """Replace every tensor of a file by what `edit` makes of its key and value."""
    state = load_file(file) if file.suffix == ".safetensors" else torch.load(file)
    found = {key: x.clone().contiguous() for name, value in state.items() for key, x in edit(name, value).items()}
    save_file(found, file) if file.suffix == ".safetensors" else torch.save(found, file)


def of(ending: str, edit: Callable[[Tensor], Tensor]) -> Callable[[str, Tensor], Mapping[str, Tensor]]:
    """Return an edit of the tensors whose key ends so."""
    return lambda key, x: {key: edit(x) if key.endswith(ending) else x}


def without(ending: str) -> Callable[[str, Tensor], Mapping[str, Tensor]]:
    return lambda key, x: {} if key.endswith(ending) else {key: x}


def renamed(old: str, new: str) -> Callable[[str, Tensor], Mapping[str, Tensor]]:
    return lambda key, x: {key.replace(old, new): x}


def beside(key: str, value: Tensor) -> Callable[[str, Tensor], Mapping[str, Tensor]]:
    return lambda name, x: {name: x, key: value}


def as_safetensors(file: Path) -> None:
    save_file(torch.load(file), file.with_suffix(".safetensors"))
    file.unlink()


def as_pickle(file: Path) -> None:
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()


@pytest.mark.parametrize(
    "written_so",
    [
        lambda path: as_pickle(path / ADAPTERS),
        lambda path: as_safetensors(path / TRAINED),
        lambda path: change(path / ADAPTERS, renamed(".weight", ".default.weight")),
        lambda path: change(path / ADAPTERS, renamed("base_model.model.", "")),
        lambda path: change(path / ADAPTERS, renamed("base_model.", "base_model.model.base_model.")),
        lambda path: change(path / TRAINED, renamed("base_model.model.", "")),
        lambda path: change(path / TRAINED, renamed("base_model.model.model.", "")),
        lambda path: change(path / TRAINED, renamed("base_model.", "base_model.model.base_model.")),
        lambda path: set_json(path / "adapters/adapter_config.json", rank_pattern={}, modules_to_save=None, use_dora=False),
    ],
    ids=["bin", "safetensors", "named", "no-prefix", "two-prefixes", "model", "bare", "wrapped-twice", "off"],
)
def test_the_same_model_written_in_other_ways(
    written: tuple[nn.Module, Path], folder: Path, written_so: Callable[[Path], None]
) -> None:
    written_so(folder)
    found, due = Bimba.from_pretrained(folder / "adapters").state_dict(), written[0].state_dict()
    assert found.keys() == due.keys()
    for name, x in due.items():
        torch.testing.assert_close(found[name], x, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"r": None}, "r is None; allowed: a positive number"),
        ({"r": 0}, "r is 0; allowed"),
        ({"r": "2"}, "r is '2'; allowed"),
        ({"lora_alpha": None}, "lora_alpha is None; allowed"),
        ({"r": 4}, r"lora_A \(2, 32\) and lora_B \(32, 2\); allowed, by r=4 in adapter_config.json: lora_A \(4, 32\)"),
        ({"peft_type": "IA3"}, "no plain LoRA: peft_type is 'IA3'; allowed"),
        ({"bias": "all"}, "no plain LoRA: bias is 'all'; allowed"),
        ({"rank_pattern": {"q_proj": 4}}, "no plain LoRA: rank_pattern is {'q_proj': 4}; allowed"),
        ({"alpha_pattern": {"q_proj": 4}}, "no plain LoRA: alpha_pattern is"),
        ({"modules_to_save": ["lm_head"], "use_dora": True}, r"use_dora is True, modules_to_save is \['lm_head'\]; allowed"),
    ],
    ids=str,
)  # fmt: skip
def test_adapters_of_another_kind_or_rank_are_said(folder: Path, options: dict[str, Any], said: str) -> None:
    set_json(folder / "adapters/adapter_config.json", **options)
    with pytest.raises(CheckpointError, match=said):
        Bimba.from_pretrained(folder / "adapters")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (without(V_OF_1 + ".lora_B.weight"), r"layers.1.self_attn.v_proj.weight, \(16, 32\), there are lora_A \(2, 32\); all"),
        (without(V_OF_1 + ".lora_A.weight"), r"layers.1.self_attn.v_proj.weight, \(16, 32\), there are lora_B \(16, 2\); all"),
        (of(V_OF_1 + ".lora_B.weight", lambda x: x.new_zeros(16, 3)), r"lora_A \(2, 32\) and lora_B \(16, 3\); allowed"),
        (of("lora_A.weight", lambda x: x.new_zeros(2, 48)), r"lora_A \(2, 48\) and lora_B \(32, 2\); allowed"),
        (of("lora_A.weight", lambda x: x.new_zeros(2, 1)), r"lora_A \(2, 1\) and lora_B"),
        (renamed("layers.1.", "layers.7."), "adapts language_model.model.layers.7.self_attn.q_proj.weight, which the base mod"),
        (renamed("self_attn.v_proj", "input_layernorm"), r"input_layernorm.weight, \(32,\), there are"),
        (beside("base_model.model.lm_head.weight", torch.zeros(50, 32)), "holds base_model.model.lm_head.weight; allow"),
        (beside(V_OF_1 + ".lora_magnitude_vector", torch.zeros(16)), "holds .*lora_magnitude_vector; allowed: lora_A"),
        (beside(V_OF_1 + ".lora_A.second.weight", torch.zeros(2, 32)), "lora_A of .* twice; allowed: one adapter"),
        (of("lora_A.weight", lambda x: x.to(torch.int8)), "is a tensor of torch.int8; allowed: tensors of floating-point"),
        (lambda key, x: {}, "holds no adapters; allowed"),
    ],
    ids=range(12),
)  # fmt: skip
def test_matrices_that_do_not_fit_are_said(
    folder: Path, edit: Callable[[str, Tensor], Mapping[str, Tensor]], said: str
) -> None:
    change(folder / ADAPTERS, edit)
    with pytest.raises(CheckpointError, match=said):
        Bimba.from_pretrained(folder / "adapters")


@pytest.mark.parametrize(
    ("breaks", "said"),
    [
        (
            lambda path: change(path / TRAINED, of("mm_projector.0.weight", lambda x: x.new_zeros(24, 16))),
            r"1 keys of another shape, the first is mm_projector.0.weight, \(24, 16\) where the model has \(32, 16\)",
        ),
        (
            lambda path: change(path / TRAINED, beside("mm_projector.0.weight", torch.zeros(32, 16))),
            "holds mm_projector.0.weight twice, as base_model.model.model.mm_projector.0.weight and as mm_projector.0.weight",
        ),
        (lambda path: torch.save({"epoch": 3}, path / TRAINED), "epoch is a int; allowed: tensors of floating-point"),
        (lambda path: (path / TRAINED).unlink(), "no non_lora_trainables.bin or .safetensors in the folder"),
        (lambda path: (path / ADAPTERS).unlink(), "no adapter_model.safetensors or .bin in the folder"),
        (lambda path: change(path / "base/model.safetensors", without("lm_head.weight")), "missing keys, .*lm_head.weight"),
        (
            lambda path: shutil.copy(path / "base/model.safetensors", path / "base/model-00001-of-00002.safetensors"),
            "twice, in model.safetensors and before it; allowed: one set of files",
        ),
        (
            lambda path: change(path / "base/model.safetensors", of("q_proj.weight", lambda x: x.to(torch.int8))),
            "q_proj.weight is a tensor of torch.int8; allowed",
        ),
        (lambda path: set_json(path / "base/config.json", mm_spatial_pool_mode="cubic"), "mm_spatial_pool_mode .*'cubic'"),
        (lambda path: set_json(path / "base/config.json", temporal_pooling=-1), "temporal_pooling .* got -1"),
        (lambda path: set_json(path / "base/config.json", hidden_size="a"), "config.json is no Qwen2Config: .*hidden_size"),
        (lambda path: set_json(path / "base/config.json", vision_config=[1]), r"vision_config .* got \[1\]"),
        (
            lambda path: set_json(path / "adapters/adapter_config.json", base_model_name_or_path="lmms-lab/LLaVA-Video-7B"),
            "adapters of 'lmms-lab/LLaVA-Video-7B', which is no folder here: download .* pass base_model=FOLDER",
        ),
        (lambda path: set_json(path / "adapters/adapter_config.json", base_model_name_or_path=3), "adapters of 3, which is no"),
    ],
    ids=range(14),
)  # fmt: skip
def test_broken_folders_are_said(folder: Path, breaks: Callable[[Path], Any], said: str) -> None:
    breaks(folder)
    with pytest.raises((CheckpointError, ValueError, FileNotFoundError), match=said):
        Bimba.from_pretrained(folder / "adapters")


@pytest.mark.usefixtures("unchecked")
def test_a_folder_that_is_no_path_is_said() -> None:
    with pytest.raises(TypeError, match="folder is a NoneType; allowed: the path of a folder"):
        Bimba.from_pretrained(None)  # type: ignore[arg-type]


def test_a_tied_head_is_one_parameter(tmp_path: Path) -> None:
    """In another dtype than the stored one too."""
    state = upstream_state(model(tie_word_embeddings=True))
    del state["lm_head.weight"]
    folder = write(tmp_path / "tied", state, {**CONFIG, "tie_word_embeddings": True})
    found = Bimba.from_pretrained(folder, dtype=torch.bfloat16).language_model
    assert found.lm_head.weight is found.model.embed_tokens.weight
