"""Models as modules: copies and pickles, inference mode, and which backend and operators a call reaches."""

import copy
import io
import pickle
from unittest import mock

import pytest
import torch
from golden import fill, golden
from toy_models import TOY, clip_of, flat, mask_of, results

import fused
from fused import backends, stamp
from fused.models.videomamba import embedding
from fused.modules import mamba as mixer
from fused.ops import mamba_ssm as upstream
from fused.ops.mamba_inner import eager as inner
from fused.ops.selective_scan import api as scan


@pytest.mark.parametrize("kind", ["VideoMamba", "VideoMambaEncoder"])
@pytest.mark.parametrize("called", [False, True], ids=["new", "used"])
def test_models_copy_pickle_and_save(kind, called):
    model = golden(getattr(fused, kind)(fused.VideoMambaConfig(**TOY, ssm_cfg={"d_state": 4}, scan_order="both")))
    clip = clip_of(model.config).float()
    wanted = flat(model(clip))
    if not called:
        model = golden(getattr(fused, kind)(model.config))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert twin.backend == model.backend and twin.config == model.config
        assert all(torch.equal(a, b) for a, b in zip(flat(twin(clip)), wanted, strict=True))
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    called = torch.func.functional_call(model, parameters, (clip,))
    assert all(torch.equal(a, b) for a, b in zip(flat(called), wanted, strict=True))
    assert model.to(torch.bfloat16).to(torch.float64).double()(clip.double()) is not None


def test_inference_mode_leaves_nothing_that_breaks_training():
    embedding._cached_sincos.cache_clear()
    model = golden(fused.VideoMambaEncoder(fused.VideoMambaConfig(**TOY, scan_order="temporal")))
    clip = clip_of(model.config).float()
    with torch.inference_mode():
        model(clip, mask_of(17))
        model(clip)
    results(model, clip)


def test_backend_is_auto_until_the_first_call(monkeypatch):
    monkeypatch.delenv("VIDEOMAMBA_DISABLE_FUSED", raising=False)
    config = fused.VideoMambaConfig(**TOY)
    model, named = fused.VideoMamba(config), fused.VideoMamba(config, backend="torch")
    assert (model.backend, named.backend) == ("auto", "torch")
    with (
        mock.patch.object(backends, "choose", side_effect=backends.choose) as choose,
        mock.patch.object(stamp, "remind", side_effect=AssertionError("the stamp is not a matter of CPUs")),
    ):
        model(clip_of(config).float())
        asked = [call.args[0] for call in choose.call_args_list]
        assert asked.count("auto") == 1 and set(asked) == {"auto"}  # one choice, handed down
        model(clip_of(config).float())
        assert [call.args[0] for call in choose.call_args_list].count("auto") == 1
        named(clip_of(config).float())
    assert (model.backend, named.backend) == ("cpu", "torch")


@pytest.mark.parametrize("fast", [True, False])
def test_use_fast_path_reaches_the_choice(fast):
    config = fused.VideoMambaConfig(**TOY, ssm_cfg={"use_fast_path": fast})
    model = fused.VideoMamba(config)
    with mock.patch.object(backends, "choose", side_effect=backends.choose) as choose:
        model(clip_of(config).float())
        model.layers[0].mixer(torch.zeros(1, 2, 32))
    assert [c.kwargs["use_fast_path"] for c in choose.call_args_list if c.args[0] == "auto"] == [fast, fast]


def test_operators_are_reached_through_their_modules():
    model = golden(fused.VideoMamba(fused.VideoMambaConfig(**TOY), backend="torch"))
    clip = clip_of(model.config).float()
    wanted = model(clip)
    run_segments = inner.segments.both_directions_in_segments
    with mock.patch.object(inner.segments, "both_directions_in_segments", side_effect=run_segments) as spy:
        model(clip)
    assert spy.call_count == 2
    with mock.patch.object(inner, "scan_both_directions", side_effect=inner.scan_both_directions) as spy:
        copy.deepcopy(model).bfloat16()(clip.bfloat16())
    assert spy.call_count == 2
    causal = golden(fused.VideoMamba(fused.VideoMambaConfig(**TOY, bimamba=False, readout="mean"), backend="torch"))
    with mock.patch.object(scan, "selective_scan", side_effect=scan.selective_scan) as spy:
        causal(clip)
    assert [call.kwargs["reverse"] for call in spy.call_args_list] == [False] * 2

    def swapped(self):
        return directions(self)[::-1]

    directions = mixer.Mamba.directions
    with mock.patch.object(mixer.Mamba, "directions", swapped):
        assert not torch.allclose(model(clip), wanted)


@pytest.mark.parametrize("backend", ["mamba_ssm", "mamba_ssm_inner"])
def test_upstreams_backends_take_the_whole_mixer(backend):
    model, x = golden(fused.Mamba(32)), fill(2, 9, 32, phase=7)

    def run(hidden, in_proj, out_proj, directions, *, inner):
        assert (in_proj, out_proj) == (model.in_proj, model.out_proj) and inner == (backend == "mamba_ssm_inner")
        assert [w.A for w in directions] == [model.A_log, model.A_b_log]
        return hidden + 1

    with mock.patch.object(backends, "choose", return_value=backend), mock.patch.object(upstream, "mamba_mixer", run):
        assert torch.equal(model(x), x + 1)


def test_a_traced_forward_stores_no_backend(monkeypatch):
    """A backend that it stored would be a guard that its own second call does not pass: the model would be compiled twice."""
    model = fused.VideoMamba(fused.VideoMambaConfig(embed_dim=16, depth=1, img_size=32, num_frames=2, num_classes=3))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert model.resolve_backend(torch.ones(1)) == "cpu" and model.backend == "auto"
    monkeypatch.undo()
    assert model.resolve_backend(torch.ones(1)) == model.backend == "cpu"
