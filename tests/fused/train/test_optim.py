"""Parameter groups hold every parameter once, with the learning rate and decay that its name implies."""

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn

from fused import VideoMamba, VideoMambaConfig, VideoMambaEncoder
from fused.train import parameter_groups

TOY = {"img_size": 16, "patch_size": 8, "depth": 3, "embed_dim": 16, "num_frames": 2, "num_classes": 5, "clip_output_dim": 6}
KINDS = {
    "classifier": lambda: VideoMamba(VideoMambaConfig(**TOY)),
    "image": lambda: VideoMamba(VideoMambaConfig(**TOY | {"num_frames": None})),
    "student": lambda: VideoMamba(VideoMambaConfig(**TOY, distill_dim=8)),
    "encoder": lambda: VideoMambaEncoder(VideoMambaConfig(**TOY, clip_return_layer=2)),
    "causal, LayerNorm, biases": lambda: VideoMambaEncoder(
        VideoMambaConfig(**TOY, bimamba=False, pool_type="avg", rms_norm=False, ssm_cfg={"bias": True})
    ),
}
LR, DECAY = 0.01, 0.05


def settings(model: nn.Module, **how: Any) -> dict[str, tuple[float, float]]:
    """Return (lr, weight_decay) by parameter name, from an optimiser with the groups."""
    groups = torch.optim.AdamW(parameter_groups(model, LR, DECAY, **how)).param_groups
    found = [(id(p), group["lr"], group["weight_decay"]) for group in groups for p in group["params"]]
    assert len({key for key, *_ in found}) == len(found), "no parameter twice"
    by_id = {key: rest for key, *rest in found}
    names = {name: tuple(by_id.pop(id(p))) for name, p in model.named_parameters() if p.requires_grad}
    assert not by_id and len({group["name"] for group in groups}) == len(groups)
    return names


FREE = r"(cls_token|pos_embed|temporal_pos_embedding|.*norm.*|.*\.bias|.*\.D|.*\.D_b|distill_head\.0\.weight)"
STATE = r".*\.(A_log|A_b_log)"
DECAYED = r"(.*(proj|proj_b|conv1d|conv1d_b)\.weight|(head|clip_decoder\.\d\.head|distill_head\.1)\.weight)"


@pytest.mark.parametrize("kind", KINDS)
def test_weight_decay(kind: str) -> None:
    model = KINDS[kind]()
    upstream, corrected = settings(model), settings(model, rule="corrected")
    for name in upstream:
        state, free = re.fullmatch(STATE, name), re.fullmatch(FREE, name)
        assert bool(state) + bool(free) + bool(re.fullmatch(DECAYED, name)) == 1, name
        assert upstream[name] == (LR, 0.0 if free else DECAY), name
        assert corrected[name] == (LR, 0.0 if free or state else DECAY), name
    assert sum(bool(re.fullmatch(STATE, name)) for name in upstream) == 3 * (1 if "causal" in kind else 2)


@pytest.mark.parametrize("kind", KINDS)
def test_layer_decay(kind: str) -> None:
    """At depth 3 the exponents are 4 for embeddings, 3, 2, 1 for layers, 0 for the rest; "upstream" has only the first."""
    model = KINDS[kind]()
    upstream, corrected = settings(model, layer_decay=0.5), settings(model, layer_decay=0.5, rule="corrected")
    for name in upstream:
        layer = re.match(r"layers\.(\d)\.", name)
        first = re.match(r"cls_token$|pos_embed$|patch_embed\.", name)
        power = 4 if first or name == "temporal_pos_embedding" else 3 - int(layer[1]) if layer else 0
        assert corrected[name][0] == LR / 2**power, name
        assert upstream[name][0] == (LR / 16 if first else LR), name
    assert settings(model, layer_decay=1.0) == settings(model)


def test_frozen_and_shared_parameters() -> None:
    model = KINDS["encoder"]()
    model.patch_embed.requires_grad_(False)
    model.clip_decoder[1].head.weight = model.clip_decoder[0].head.weight
    names = settings(model, layer_decay=0.5)
    assert not any(name.startswith("patch_embed") for name in names) and "cls_token" in names


def test_wrappers_and_larger_models() -> None:
    """Name prefixes of a wrapper or an outer model change nothing; other modules learn at the full rate."""
    for rule in ("upstream", "corrected"):
        inner = KINDS["encoder"]()
        alone = settings(inner, layer_decay=0.5, rule=rule)
        outer = nn.ModuleDict({"vision": inner, "layers": nn.Linear(4, 4)})
        found = settings(outer, layer_decay=0.5, rule=rule)
        assert {name: found.pop("vision." + name) for name in alone} == alone
        assert found == {"layers.weight": (LR, DECAY), "layers.bias": (LR, 0.0)}


def test_the_rates_are_applied() -> None:
    """Without gradients AdamW only decays: by lr * weight_decay of its group."""
    model = KINDS["classifier"]()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
    torch.optim.AdamW(parameter_groups(model, 0.5, 0.25, 0.5, "corrected")).step()
    after = model.state_dict()
    assert torch.equal(after["head.weight"], before["head.weight"] * (1 - 0.125))
    assert torch.equal(after["layers.1.mixer.in_proj.weight"], before["layers.1.mixer.in_proj.weight"] * (1 - 0.125 / 4))
    assert torch.equal(after["layers.1.mixer.A_log"], before["layers.1.mixer.A_log"])
    assert torch.equal(after["pos_embed"], before["pos_embed"])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("how", "error", "wanted"),
    [
        ({"rule": "timm"}, ValueError, "rule must be one of 'upstream', 'corrected', got 'timm'"),
        ({"lr": 0}, ValueError, r"lr must be a number in \(0, inf\), got 0"),
        ({"weight_decay": -1}, ValueError, r"weight_decay must be a number in \[0, inf\), got -1"),
        ({"layer_decay": 0}, ValueError, r"layer_decay must be a number in \(0, 1\], got 0"),
        ({"layer_decay": 1.5}, ValueError, r"layer_decay must be a number in \(0, 1\], got 1.5"),
        ({"model": nn.Identity()}, ValueError, "model must have a parameter with requires_grad"),
        ({"model": [nn.Linear(2, 2)]}, TypeError, "model must be a torch.nn.Module, got list"),
    ],
)
def test_errors(how: dict[str, Any], error: type[Exception], wanted: str) -> None:
    with pytest.raises(error, match=wanted):
        parameter_groups(**{"model": nn.Linear(2, 2), "lr": 1e-3, "weight_decay": 0.05} | how)
