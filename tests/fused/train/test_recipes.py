"""Each recipe is read and fits its model at full size, and takes a step of its training with a small one."""

import math
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from videos import write_images, write_video

from fused import PRETRAINED, VideoMamba, VideoMambaConfig, VideoMambaEncoder
from fused.evaluate import PROTOCOLS
from fused.models.videomamba.published import CLASSES, SIZES
from fused.train.__main__ import main
from fused.train.config import TrainConfig
from fused.train.config_file import read_config, to_yaml
from fused.train.loop import Trainer
from fused.train.optim import parameter_groups
from fused.train.parallel import World
from fused.train.recipes import FOLDER, describe_recipe, recipe_names
from harness.instruments.two_processes import log

CPU = torch.device("cpu")
FAMILIES = ("k400", "ssv2", "breakfast", "coin", "lvu", "image", "distill", "pretrain")
SIZE_NAMES = {"tiny": "t16", "small": "s16", "middle": "m16", "base": "b16"}
RESOLUTIONS = {"224": "224", "448": "224to448", "576": "224to448to576"}
SMALL = "data.frames=2 data.size=32 data.workers=0 model.depth=2 device=cpu precision=float32".split()
SECONDS = 60  # of the processor, for all steps together; a busy machine takes longer by the clock
taken: list[float] = []  # of each


def full(name: str) -> TrainConfig:
    """Return a recipe as its user completes it."""
    teacher = ["teacher=clip"] * name.startswith("pretrain")
    return read_config(f"recipe:{name}", ["out=run", "data.train=videos", *teacher])


def model_config(config: TrainConfig) -> VideoMambaConfig:
    """Return the configuration of a recipe's model, at full size, without the number of classes."""
    fields = {key: value for key, value in config.model.items() if key != "size"}
    fields |= {"img_size": config.data.size, "num_frames": config.data.frames}
    if config.start is not None:
        return replace(PRETRAINED[config.start].config, **fields)
    return getattr(VideoMambaConfig, config.model["size"])(**fields)


def test_there_is_one_for_each_published_model() -> None:
    """A published classifier has the recipe that trained it; masked pretraining has one for each data set."""
    trained = set()
    for name in recipe_names():
        family, size, *rest = name.split("_")
        mask, sizes = "mask" in rest, [part for part in rest if part != "mask"]
        if family == "pretrain":
            trained.add(f"videomamba_m16_{size}_mask_pt_f8_res224")
        elif family in ("image", "distill"):
            trained.add(f"videomamba_{SIZE_NAMES[size]}_in1k_res{RESOLUTIONS[sizes[0] if sizes else '224']}")
        elif family != "lvu":  # whose weights were not published
            side = f"224to{sizes[1]}" if len(sizes) > 1 else "224"
            trained.add(f"videomamba_{SIZE_NAMES[size]}_{family}{'_mask_ft' * mask}_{sizes[0]}_res{side}")
        assert family in FAMILIES
    assert trained == {name for name in PRETRAINED if not re.search(r"_\d+M_", name)}  # video-text models are another training


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_fits_its_model_at_full_size(name: str, tmp_path: Path) -> None:
    """Its keys, its initial weights, its optimiser's groups and its own text as YAML."""
    config = full(name)
    family = name.split("_")[0]
    kind: Any = VideoMambaEncoder if family == "pretrain" else VideoMamba
    with torch.device("meta"):
        model = kind(model_config(config))
    optim = config.optim
    groups = parameter_groups(model, optim.lr, optim.weight_decay, optim.layer_decay, optim.rule)
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())
    depth = model.config.depth
    assert min(group["lr"] for group in groups) == pytest.approx(optim.lr * optim.layer_decay ** (depth + 1))
    [size] = [size for size in SIZE_NAMES if size in name]
    named = SIZES[SIZE_NAMES[size]]()
    assert (model.config.embed_dim, depth) == (named.embed_dim, named.depth)
    assert 0 < (optim.warmup_epochs or 0) < config.epochs and config.precision == "bfloat16" and optim.rule == "upstream"
    if family in CLASSES and family != "in1k":
        assert config.data.erased == 0.25 and config.data.repeats == 2 and config.data.augment is not None
        assert PROTOCOLS[family].clips and f"--protocol {family}" in (FOLDER / f"{name}.yaml").read_text()
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert read_config(tmp_path / "run.yaml") == config
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    assert lines[0].startswith("# VideoMamba-") and max(map(len, lines)) <= 128


@pytest.mark.parametrize("name", recipe_names())
def test_the_learning_rate_is_that_of_the_batch(name: str) -> None:
    """The head states the rule, the batch there and what is drawn of a video; lr and the ends of the schedule follow."""
    config, text = full(name), (FOLDER / f"{name}.yaml").read_text().replace("\n# ", " ")
    rule = re.search(r"lr is ([\d.e-]+) \* (clips|images) of a step / (\d+)", text)
    there = re.search(r"there (\d+) GPUs took (\d+) (?:videos?|images) each(?: \([^)]*\))?(?:, (\d) times a step)?", text)
    assert rule and there, text
    batch = int(there[1]) * int(there[2]) * int(there[3] or 1) * (config.data.repeats if rule[2] == "clips" else 1)
    assert config.optim.lr == pytest.approx(float(rule[1]) * batch / int(rule[3]), rel=1e-4)
    assert abs(config.batch_size - batch) <= 24 and (config.batch_size == batch or f"{config.batch_size} for {batch}" in text)
    assert config.batch_size % config.data.repeats == 0


def test_the_numbers_of_one_recipe() -> None:
    """Upstream's: 8 GPUs with 64 videos, 2 clips of each, 2e-4 * 1024 / 256, from 1e-6 * 1024 / 256 in 5 of 70 epochs."""
    config = full("k400_tiny_f8")
    assert (config.batch_size, config.epochs, config.optim.warmup_epochs, config.data.repeats) == (1024, 70, 5, 2)
    assert config.optim.lr == 8e-4 and config.optim.floor * config.optim.lr == pytest.approx(1e-6 * 4)
    assert config.optim.weight_decay == 0.1 and config.model == {"drop_path_rate": 0.1}
    assert config.start == "videomamba_t16_in1k_res224" and config.inflate == "centre"
    assert config.data.augment == "rand-m5-n2-mstd0.25-inc1" and config.data.scale == (0.08, 1.0)
    assert full("k400_middle_mask_f8").optim.layer_decay == 0.8 and full("ssv2_small_f8").data.flip == 0
    assert full("pretrain_k400_middle_f8").optim.lr == 1.2e-3 and full("pretrain_k400_middle_f8").mask.ratio == 0.8
    assert math.isclose(full("distill_middle").optim.floor, 5e-6 / 2e-3)


def test_they_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names() and len(lines) == 62
    assert "k400_tiny_f8              VideoMamba-Ti on Kinetics-400, 8 frames of 224 pixels: published top-1 76.9" in lines
    assert describe_recipe("lvu_tiny_f32").endswith("48.23 (year)")
    assert describe_recipe("lvu_tiny_f32_regression").endswith("published mean squared error 0.26 (like), 2.90 (view)")


def test_names_and_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", "recipe:k400_tiny_f9"]) == 2
    error = capsys.readouterr().err
    assert "config is 'recipe:k400_tiny_f9'; allowed: recipe: and a name that --recipes lists" in error
    assert "the nearest are k400_tiny_f8" in error
    assert main(["--config", "recipe:k400_tiny_f8"]) == 2 and "out is None" in capsys.readouterr().err
    assert main(["--config", "recipe:pretrain_ssv2_middle_f8", "out=run", "data.train=videos"]) == 2
    assert "teacher is None" in capsys.readouterr().err
    assert main(["--config", "recipe:k400_tiny_f8", "optim.lr=1e-3", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert "lr: 0.001" in printed and "epochs: 70" in printed and "out: null  # required" in printed


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with videos and images of two classes, a list of numbers, small published weights by name, and a CLIP."""
    transformers = pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("data")
    for name in ("a", "b"):
        for i in range(3):
            (root / "videos" / name).mkdir(parents=True, exist_ok=True)
            write_video(root / "videos" / name / f"{i}.avi", frames=4, width=48, height=40, step=4 + i)
        write_images(root / "images" / name, [f"{i}.png" for i in range(3)])
    (root / "numbers.csv").write_text("".join(f"videos/{name}/{i}.avi,{i}.5\n" for name in ("a", "b") for i in range(3)))
    torch.manual_seed(0)
    clip = transformers.CLIPVisionConfig(
        image_size=32, patch_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    transformers.CLIPVisionModelWithProjection(clip).save_pretrained(root / "clip")
    return root


def small_start(name: str, root: Path) -> Path:
    """Return a folder of published weights' size but for depth, frames and pixels, of random values."""
    folder = root / name
    if not folder.exists():
        published = PRETRAINED[name]
        frames = published.config.num_frames and 2
        config = replace(published.config, depth=2, img_size=32, num_frames=frames)
        (VideoMamba if published.model == "VideoMamba" else VideoMambaEncoder)(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", recipe_names())
def test_a_step_of_each(name: str, data: Path, tmp_path: Path) -> None:
    """With two frames of 32 pixels, depth 2, full width; the initial weights are those of a model as published."""
    begun = time.process_time()
    recipe = full(name)
    kind = {"regress": "numbers.csv"}.get(str(recipe.task), "images" if recipe.data.frames is None else "videos")
    words = [*SMALL, f"out={tmp_path}", f"data.train={data / kind}", f"batch_size={2 * recipe.data.repeats}"]
    words += ["epochs=null", "steps=1", "optim.warmup_epochs=0", "save_every=null", "log_every=1"]
    if recipe.data.frames is None:
        words[0] = "data.frames=null"
    if recipe.start is not None:
        words.append(f"start={small_start(recipe.start, data)}")
    if recipe.task == "distill":
        words.append(f"teacher={small_start(str(recipe.teacher), data)}")
    if recipe.task == "pretrain":
        words.append(f"teacher={data / 'clip'}")
    trainer = Trainer(read_config(f"recipe:{name}", words), World(CPU))
    before = [p.detach().clone() for p in trainer.task.student.parameters()]
    assert not trainer.run()
    [step] = [line for line in log(tmp_path) if "loss" in line]
    assert math.isfinite(step["loss"]) and step["lr"] == pytest.approx(recipe.optim.lr) and step["grad_norm"] > 0
    after = list(trainer.task.student.parameters())
    assert sum(not torch.equal(x, y) for x, y in zip(before, after, strict=True)) > len(after) / 2
    taken.append(time.process_time() - begun)
    assert sum(taken) < SECONDS, f"{len(taken)} recipes took {sum(taken):.0f} s"
