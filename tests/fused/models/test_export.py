"""A classifier leaves PyTorch's eager mode: compiled, exported, and as ONNX; what comes back keeps to the tolerance rule."""

import io
import sys
from unittest import mock

import naive
import pytest
import torch
from golden import fill, golden
from rule import assert_rule, outcome

import fused
import reference
from fused.ops.add_norm import eager as norm_eager
from fused.ops.causal_conv1d import eager as conv_eager
from fused.ops.selective_scan import export as scan_export

TOY = {"img_size": 32, "depth": 1, "embed_dim": 32, "num_frames": 4, "num_classes": 5}
DISTILLED = {"distill_dim": 9}
MODELS = {
    "plain": {"depth": 2},
    "everything-else": {
        "kernel_size": 2, "rms_norm": False, "fused_add_norm": False, "scan_order": "both",
        "ssm_cfg": {"bias": True, "d_conv": 3},
    },
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("unchecked")  # a checked signature is more than a graph can hold


def judged(overrides, runs, batch=1):
    """`runs(model, clip)` gives the outputs to judge, against the reference in float64; four batches, one set of weights."""
    config = TOY | overrides
    fast = golden(fused.VideoMamba(fused.VideoMambaConfig(**config)))
    plain, truth = (golden(reference.VideoMamba(reference.VideoMambaConfig(**config))) for _ in range(2))
    truth.double()
    sides = config["img_size"] if isinstance(config["img_size"], tuple) else (config["img_size"],) * 2
    clips = [fill(batch, 3, *([config["num_frames"]] * bool(config["num_frames"])), *sides, phase=p) for p in (7, 8, 9, 10)]
    with torch.no_grad():
        run = runs(fast, clips[0])
        samples = [(named(run(x)), named(truth(x.double())), named(plain(x))) for x in clips]
    assert_rule(samples)


def named(outputs):
    return {str(i): torch.as_tensor(x) for i, x in enumerate(outputs if isinstance(outputs, tuple | list) else [outputs])}


def operators():
    """Each pure form as (name, function of tensors, the plain loop, tensors): odd lengths, every option."""
    E, N, K = 6, 3, 4
    for reverse in (False, True):
        for L, groups in ((1, None), (8, None), (37, None), (37, 2)):
            mix = (2, L, N) if groups is None else (2, L, groups, N)
            tensors = {
                "u": fill(2, L, E, phase=1), "delta": fill(2, L, E, phase=2), "A": -fill(E, N, phase=3).exp(),
                "B": fill(*mix, phase=4), "C": fill(*mix, phase=5), "D": fill(E, phase=6), "z": fill(2, L, E, phase=7),
                "delta_bias": fill(E, phase=8), "initial_state": fill(2, E, N, phase=9),
            }  # fmt: skip

            def pure(*, initial_state, reverse=reverse, **own):
                return scan_export.selective_scan(*own.values(), True, initial_state, reverse)

            yield f"scan-{L}-{groups}-{reverse}", pure, lambda reverse=reverse, **x: naive.scan(**x, reverse=reverse), tensors
        for L in (1, 9):
            tensors = {"x": fill(2, L, E, phase=1), "weight": fill(E, K, phase=2), "bias": fill(E, phase=3)}
            tensors["initial_state"] = fill(2, E, K - 1, phase=4)

            def pure(*, initial_state, reverse=reverse, **own):
                return conv_eager.exported(*own.values(), initial_state, True, reverse)

            yield f"conv-{L}-{reverse}", pure, lambda reverse=reverse, **x: naive.conv(**x, reverse=reverse), tensors
    for kind in ("rms", "layer"):
        tensors = {
            "x": fill(5, 8, phase=1),
            "weight": fill(8, phase=2),
            "bias": fill(8, phase=3),
            "residual": fill(5, 8, phase=4),
        }

        def pure(kind=kind, **own):
            with mock.patch.object(norm_eager, "is_exporting", lambda: True):
                return norm_eager.add_norm_eager(**own, kind=kind)

        yield f"norm-{kind}", pure, lambda kind=kind, **x: naive.norm(**x, kind=kind), tensors


@pytest.mark.parametrize("name, pure, loop, tensors", list(operators()), ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pure_forms_are_the_operators(name, pure, loop, tensors, dtype):
    """Values, states and gradients; in bfloat16, where gradients are rounded at every sum, values and states."""
    samples = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        drawn = {k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in tensors.items()}
        drawn |= {"A": -drawn["A"].abs()} if "A" in drawn else {}
        low = {k: v.to(dtype) if k in ("u", "delta", "B", "C", "z", "x") else v for k, v in drawn.items()}
        seeds = [torch.randn(y.shape, generator=generator) for y in loop(**tensors)]
        how = [outcome(pure, low, seeds, None), *(outcome(loop, low, seeds, p) for p in (torch.float64, torch.float32))]
        samples.append(tuple({k: v for k, v in x.items() if dtype == torch.float32 or k.startswith("out")} for x in how))
    assert_rule(samples)


@pytest.mark.parametrize("name", MODELS)
def test_torch_export(name):
    """The exported program, saved and loaded, gives what the model gives."""

    def exported(model, clip):
        file = io.BytesIO()
        torch.export.save(torch.export.export(model, (clip,)), file)
        file.seek(0)
        assert model(clip) is not None  # nothing of the export is left in what eager mode keeps
        program = torch.export.load(file).module()
        refused = r"clip.size\(\)\[0\] == 1|args\[0\].shape\[0\] to be equal to 1, but got 2"  # PyTorch 2.13; 2.8
        with pytest.raises((AssertionError, RuntimeError), match=refused):
            program(clip.expand(2, -1, -1, -1, -1))
        return program

    judged(MODELS[name], exported)


@pytest.mark.filterwarnings("ignore:Dynamo detected")
def test_torch_compile():
    """Logits and gradients of a compiled model are those of the eager one, bit for bit."""
    results = []
    for wrap in (lambda model: model, lambda model: torch.compile(model, backend="eager")):
        model = golden(fused.VideoMamba(fused.VideoMambaConfig(**TOY)))
        logits = wrap(model)(fill(2, 3, 4, 32, 32, phase=7))
        logits.square().sum().backward()
        results.append({"logits": logits} | {name: p.grad for name, p in model.named_parameters()})
    for name, wanted in results[0].items():
        assert torch.equal(wanted, results[1][name]), name


@pytest.mark.filterwarnings("ignore")
def test_onnx(tmp_path, capsys):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    sessions = []

    def exported(model, clip):
        written = fused.export_onnx(model, tmp_path / "model.onnx")
        assert written.shape == tuple(clip.shape) and written.nodes > 0
        assert f"model.onnx: {written.nodes} nodes for clips of shape {written.shape}" in capsys.readouterr().out
        assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
        sessions.append(runtime.InferenceSession(written.path, providers=["CPUExecutionProvider"]))
        assert [x.name for x in sessions[0].get_outputs()] == ["logits", "features"]
        return lambda x: sessions[0].run(None, {"clip": x.numpy()})

    judged(DISTILLED, exported)
    with pytest.raises(Exception, match="invalid dimensions"):
        sessions[0].run(None, {"clip": fill(2, *sessions[0].get_inputs()[0].shape[1:], phase=7).numpy()})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "overrides", [DISTILLED | {"scan_order": "both", "num_frames": 2}, {"num_frames": None}], ids=["video", "image"]
)
def test_onnx_with_a_dynamic_batch(overrides, tmp_path):
    """One file for one, two and three clips: "both" runs a batch of two orders, which must not fix its size."""
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    files = []

    def exported(model, clip):
        if not files:
            written = fused.export_onnx(model, tmp_path / "model.onnx", dynamic_batch=True)
            assert written.shape == ("batch", *clip.shape[1:])
            files.append(runtime.InferenceSession(written.path, providers=["CPUExecutionProvider"]))
        assert files[0].get_inputs()[0].shape == ["batch", *clip.shape[1:]]
        return lambda x: files[0].run(None, {"clip": x.numpy()})

    for batch in (1, 2, 3):
        judged(overrides, exported, batch)


def test_onnx_takes_a_classifier(tmp_path):
    config = fused.VideoMambaConfig(**TOY)
    with pytest.raises(TypeError, match="model must be a VideoMamba, got VideoMambaEncoder"):
        fused.export_onnx(fused.VideoMambaEncoder(config), tmp_path / "x.onnx")
    with pytest.raises(ValueError, match="batch is 0; allowed: a positive integer"):
        fused.export_onnx(fused.VideoMamba(config), tmp_path / "x.onnx", batch=0)
    with pytest.raises(ValueError, match="batch is 2; with dynamic_batch the file has no batch of its own"):
        fused.export_onnx(fused.VideoMamba(config), tmp_path / "x.onnx", batch=2, dynamic_batch=True)


def test_onnx_names_its_extra(tmp_path, monkeypatch):
    for missing in ("onnx", "onnxscript"):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, missing, None)
            with pytest.raises(ImportError, match=rf"{missing}.* is not installed: pip install 'videomamba-bench\[onnx\]'"):
                fused.export_onnx(fused.VideoMamba(fused.VideoMambaConfig(**TOY)), tmp_path / "x.onnx")
