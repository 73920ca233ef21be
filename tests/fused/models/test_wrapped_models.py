"""Models with adapters, hooks and parametrizations: all modules are called, chunks honour or refuse, peft's LoRA trains."""

import copy
import logging

import pytest
import torch
import upstream_stand_ins
from torch import nn
from torch.nn.utils import parametrize, prune
from wrappers import CPU, Adapter, Times

from fused import FrameStream, VideoMamba, VideoMambaConfig, VideoMambaEncoder
from fused.models.videomamba.onnx import export_onnx
from fused.modules import wrapped

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {"img_size": 32, "embed_dim": 16, "depth": 2, "num_frames": 4, "ssm_cfg": {"d_state": 4, "dt_rank": 3}}
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton 3.6's interpreter


def classifier(seed=0, **options):
    torch.manual_seed(seed)
    model = VideoMamba(VideoMambaConfig.tiny(num_classes=3, **{**SIZES, **options}), backend="torch")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.to(DEVICE).eval()


def clips(count=2):
    return torch.randn(count, 3, 4, 32, 32).to(DEVICE)


MODELS = {
    "classifier": lambda **o: classifier(distill_dim=5, **o),
    "unfused norms": lambda **o: classifier(distill_dim=5, fused_add_norm=False, **o),
    "encoder": lambda **o: VideoMambaEncoder(VideoMambaConfig.tiny(clip_output_dim=6, **{**SIZES, **o}), backend="torch"),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("backend", ["torch", "native", *CPU])
def test_every_module_is_called(kind, backend, native_somewhere):
    """Only a list of modules is not; the model's norms are called with the sum that they share with the residual stream."""
    model = MODELS[kind]().to(DEVICE)
    model.requested_backend = backend
    called, modules = set(), {name: m for name, m in model.train().named_modules() if not isinstance(m, nn.ModuleList)}
    del modules["layers.0.drop_path"]  # the first layer has none
    for name, module in modules.items():
        module.register_forward_hook(lambda m, inputs, y, name=name: called.add(name))
    model(clips(1))
    assert called == set(modules)


def test_a_hook_on_a_norm_and_on_the_patch_embedding_changes_the_result():
    model, clip = classifier(), clips()
    before = model(clip)
    for module in (model.patch_embed.proj, model.norm_f, model.layers[1].norm):
        scaled = lambda m, inputs, y: tuple(1.5 * x for x in y) if isinstance(y, tuple) else y + y.abs()  # noqa: E731
        handle = module.register_forward_hook(scaled)
        assert not torch.allclose(model(clip), before, rtol=1e-3)
        handle.remove()
        assert torch.equal(model(clip), before)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("num_frames", [4, None])
def test_a_wrapped_patch_embedding_gives_the_tokens_of_the_merged_one(masked, num_frames):
    model = classifier(num_frames=num_frames)
    merged = copy.deepcopy(model.patch_embed)

    class Wrapped(nn.Module):
        def __init__(self, conv):
            super().__init__()
            self.conv, self.scale = conv, nn.Parameter(torch.tensor(1.5))

        def forward(self, clip):
            return self.scale * self.conv(clip)

    with torch.no_grad():
        merged.proj.weight.mul_(1.5), merged.proj.bias.mul_(1.5)
    model.patch_embed.proj = Wrapped(model.patch_embed.proj).to(DEVICE)
    clip = clips() if num_frames else clips()[:, :, 0]
    visible = torch.tensor([[0, 2], [1, 3]], device=DEVICE) if masked else None
    got = model.patch_embed(clip, visible)
    torch.testing.assert_close(got, merged(clip, visible))
    assert torch.autograd.grad(got.square().sum(), model.patch_embed.proj.scale)[0] != 0


def refusals():
    """Changes of a layer that a run in chunks cannot honour, and the words of the error."""

    def adapter(layer):
        layer.mixer.x_proj_b = Adapter(layer.mixer.x_proj_b)

    def pruned_norm(layer):
        prune.random_unstructured(layer.norm, "weight", 0.5)

    def wrapped_norm(layer):
        layer.norm = nn.Sequential(layer.norm)

    def wrapped_mixer(layer):
        layer.mixer = nn.Sequential(layer.mixer)

    def quantised(layer):
        layer.mixer.x_proj.weight = nn.Parameter(layer.mixer.x_proj.weight.detach().to(torch.int8), requires_grad=False)

    hook = lambda *arguments: None  # noqa: E731
    return {
        "layers.1.mixer.x_proj_b is a wrappers.Adapter": adapter,
        "layers.1.mixer.conv1d has 1 forward hook": lambda layer: layer.mixer.conv1d.register_forward_hook(hook),
        "layers.1.mixer has 1 forward pre-hook": lambda layer: prune.random_unstructured(layer.mixer, "D", 0.5),
        "layers.1 has 1 backward hook": lambda layer: layer.register_full_backward_hook(hook),
        "layers.1.norm has 1 forward pre-hook": pruned_norm,
        "layers.1.norm is a torch.nn.modules.container.Sequential": wrapped_norm,
        "layers.1.mixer is a torch.nn.modules.container.Sequential": wrapped_mixer,
        "weight of layers.1.mixer.x_proj, a torch.nn.modules.linear.Linear, is torch.int8": quantised,
    }


@pytest.mark.parametrize("words", refusals())
def test_a_run_in_chunks_refuses_what_it_would_not_call(words):
    model, clip = classifier(), clips()
    refusals()[words](model.layers[1])
    runs = (
        lambda: model.forward_chunked(clip, chunk_frames=2),
        lambda: next(iter(model.forward_approximate(clip, chunk_frames=2))),
    )
    for run in runs:
        with pytest.raises(ValueError, match=words):
            run()


def test_a_run_in_chunks_honours_parametrizations_and_the_modules_that_it_calls():
    model, clip = classifier(readout="mean"), clips()
    for layer in model.layers:
        for module in layer.mixer.children():
            parametrize.register_parametrization(module, "weight", Times(module.weight.shape[0], module.weight.dim()))
        parametrize.register_parametrization(layer.mixer, "A_b_log", Times(*layer.mixer.A_b_log.shape[:1], 2))
        layer.drop_path.register_forward_hook(lambda m, inputs, y: y)
    model.norm_f.register_forward_hook(lambda m, inputs, y: 1.5 * y)
    model.patch_embed.proj.register_forward_hook(lambda m, inputs, y: 1.5 * y)
    model.head = Adapter(model.head)
    model.to(DEVICE)
    parameters = dict(model.named_parameters())
    whole, chunked = model(clip), model.forward_chunked(clip, chunk_frames=2)
    torch.testing.assert_close(chunked, whole)
    grads = (torch.autograd.grad(y.square().sum(), list(parameters.values())) for y in (chunked, whole))
    for name, got, due in zip(parameters, *grads, strict=True):
        assert due.any(), name
        torch.testing.assert_close(got, due, rtol=1e-4, atol=1e-5, msg=name)


def adapted(dropout=0.0, **options):
    model = classifier(**options)
    for layer in model.layers:
        for name in ("in_proj", "x_proj", "dt_proj", "out_proj", "conv1d"):
            setattr(layer.mixer, name, Adapter(getattr(layer.mixer, name), dropout=dropout))
    return model.to(DEVICE)


def test_a_stream_of_frames_honours_adapters():
    model = adapted(bimamba=False, readout="mean")
    clip, stream = clips(1), FrameStream(model)
    with torch.no_grad():
        torch.testing.assert_close([stream(frame) for frame in clip.unbind(2)][-1], model(clip))


@pytest.mark.parametrize("backend", ["torch", "native", *CPU])
def test_layers_that_run_again_in_the_backward_draw_the_same_dropout(backend, native_somewhere):
    def gradients(again):
        model = adapted(0.5, depth=1, drop_path_rate=0.0, use_checkpoint=again, checkpoint_num=again * 1).train()
        model.requested_backend = backend
        torch.manual_seed(7)
        out = model(clip)
        return torch.autograd.grad(out.square().sum(), list(model.parameters()))

    torch.manual_seed(3)
    clip = clips(1)
    for got, due in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(got, due)


def test_the_slow_path_is_said_once_a_model(caplog, monkeypatch):
    """The first mixer with its modules, and how many more; later only what is new."""
    upstream_stand_ins.install(monkeypatch)
    monkeypatch.setattr(wrapped, "_noted", {})
    monkeypatch.setattr(wrapped, "_logged", set())
    caplog.set_level(logging.WARNING, "fused")
    model, clip = classifier(depth=4), clips(1)
    model.requested_backend = "mamba_ssm"
    for layer in list(model.layers)[1:]:
        layer.mixer.x_proj = Adapter(layer.mixer.x_proj).to(DEVICE)
    for _ in range(2):
        model(clip)
        copy.deepcopy(model)(clip)
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith("layers.1.mixer runs outside of the fused operator")
    assert message.endswith("x_proj is a wrappers.Adapter; so do 2 more mixers")
    model.layers[2].mixer.out_proj.register_forward_hook(lambda m, inputs, y: None)
    model(clip)
    assert len(caplog.records) == 2 and caplog.records[1].getMessage().startswith("layers.2.mixer runs")
    assert caplog.records[1].getMessage().endswith("out_proj has 1 forward hook, x_proj is a wrappers.Adapter")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.usefixtures("unchecked")  # a checked signature is more than a graph can hold
def test_onnx_keeps_adapters_and_hooks(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, clip = adapted(depth=1, num_frames=2), clips(1)[:, :, :2]
    model.layers[0].mixer.x_proj_b.register_forward_hook(lambda m, inputs, y: 1.5 * y)
    written = export_onnx(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(written.path)
    with torch.no_grad():
        due = model(clip)
    (got,) = session.run(None, {"clip": clip.cpu().numpy()})
    torch.testing.assert_close(torch.from_numpy(got), due.cpu(), rtol=1e-4, atol=1e-5)


TARGETS = ["in_proj", "x_proj", "x_proj_b", "dt_proj", "dt_proj_b", "out_proj", "proj", "head"]


@pytest.mark.parametrize("backend", ["torch", "native", *CPU])
def test_lora_of_peft_on_a_model_trains_drops_out_and_merges(backend, native_somewhere):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=TARGETS, lora_dropout=0.5, init_lora_weights=False)
    model, clip = peft.get_peft_model(classifier(depth=1, num_frames=2), config), clips(1)[:, :, :2]
    model.base_model.model.requested_backend = backend
    assert not torch.equal(model.train()(clip), model(clip))
    model.eval()(clip).square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(gradients) == 2 * len(TARGETS) and all(g.any() for g in gradients)
    due = model(clip)
    with pytest.raises(ValueError, match=r"layers.0.mixer.in_proj is a peft.tuners.lora.layer.Linear; .*merge the adapter"):
        model.forward_chunked(clip, chunk_frames=1)
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(clip), due)
    torch.testing.assert_close(plain.forward_chunked(clip, chunk_frames=1), due)
