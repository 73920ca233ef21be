"""The same seed gives the same training, bit for bit, and another seed a different one."""

import os
import random
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F

from fused import VideoMamba, VideoMambaConfig
from fused.train import mix, parameter_groups, setup_seed

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture(autouse=True)
def restored_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore the process-wide settings and generators that `setup_seed` changes."""
    cudnn = torch.backends.cudnn
    kept = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    drawn = random.getstate(), numpy.random.get_state()
    monkeypatch.setenv(WORKSPACE, "")
    monkeypatch.delenv(WORKSPACE)
    torch.use_deterministic_algorithms(False)
    cudnn.deterministic, cudnn.benchmark = False, True
    with torch.random.fork_rng():
        yield
    torch.use_deterministic_algorithms(kept[0])
    cudnn.deterministic, cudnn.benchmark = kept[1:]
    random.setstate(drawn[0])
    numpy.random.set_state(drawn[1])


def trained(seed: int) -> dict[str, torch.Tensor]:
    """Return weights after three steps; initial values, clips, mixtures and stochastic depth follow from the seed."""
    setup_seed(seed)
    config = VideoMambaConfig(
        img_size=16, patch_size=8, depth=3, embed_dim=16, num_frames=2, num_classes=5,
        drop_path_rate=0.5, drop_rate=0.1, use_checkpoint=True, checkpoint_num=2,
    )  # fmt: skip
    model = VideoMamba(config)
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-2, 0.05))
    for _ in range(3):
        clips = torch.from_numpy(numpy.random.standard_normal((4, 3, 2, 16, 16))).float() + random.random()
        clips, targets = mix(clips, torch.randint(5, (4,)), 5)
        F.cross_entropy(model(clips), targets, label_smoothing=0.1).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def test_training_repeats() -> None:
    once, again, other = trained(3), trained(3), trained(4)
    assert all(torch.equal(once[name], again[name]) for name in once)
    # CLS is the first token: the last layer's forward A starts alike and gets no gradient
    assert [name for name in once if torch.equal(once[name], other[name])] == ["layers.2.mixer.A_log"]


def test_every_generator() -> None:
    def drawn(seed: int) -> tuple:
        setup_seed(seed, deterministic=False)
        return random.random(), numpy.random.random(), torch.rand(()).item()

    once, again, other = drawn(0), drawn(0), drawn(2**32 - 1)
    assert once == again and all(a != b for a, b in zip(once, other, strict=True))


def test_settings() -> None:
    setup_seed(1, deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled() and WORKSPACE not in os.environ
    assert torch.backends.cudnn.benchmark and not torch.backends.cudnn.deterministic
    setup_seed(1)
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ[WORKSPACE] == ":4096:8"
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark


def test_repeatable_workspace_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACE, ":16:8")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    setup_seed(1)
    assert os.environ[WORKSPACE] == ":16:8"


def test_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match=f"CUDA has started without {WORKSPACE}.*call setup_seed before"):
        setup_seed(1)
    assert not torch.are_deterministic_algorithms_enabled() and WORKSPACE not in os.environ
    setup_seed(1, deterministic=False)  # needs nothing of CUDA


def test_unrepeatable_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACE, ":0:0")
    with pytest.raises(RuntimeError, match=f"{WORKSPACE} must be :4096:8 or :16:8 .*got ':0:0'"):
        setup_seed(1)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "error", "wanted"),
    [
        ((-1,), ValueError, "seed must be an integer from 0 to 4294967295, got -1"),
        ((2**32,), ValueError, "seed must be an integer from 0 to 4294967295, got 4294967296"),
        ((1.0,), TypeError, "seed must be an integer .*got float"),
        ((1, "yes"), TypeError, "deterministic must be True or False, got str"),
    ],
)
def test_errors(arguments: tuple[Any, ...], error: type[Exception], wanted: str) -> None:
    with pytest.raises(error, match=wanted):
        setup_seed(*arguments)
