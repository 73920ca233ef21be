"""A video in chunks gives what the whole clip gives, gradients included, in the memory of a chunk; online it approximates."""

import copy
from collections.abc import Callable

import pytest
import torch
from golden import fill
from rule import assert_rule
from test_models import CLASSIFIERS as WHOLE
from toy_models import assert_same, clip_of, flat, models, results

import fused
import reference
from fused.chunked.layer_weights import LayerParameters, LayerWeights, layer_spec


class InChunks:
    """A model whose call goes chunk by chunk."""

    def __init__(self, model, **how):
        self.model, self.how = model, how
        self.named_parameters = model.named_parameters

    def __call__(self, clip, **how):
        return self.model.forward_chunked(clip, **self.how, **how)


SAME = (
    "plain", "deep", "tubelet-2", "layernorm", "unfused", "residual-as-input", "overlap", "ssm", "forward-only", "mean",
)  # fmt: skip
CLASSIFIERS = {name: WHOLE[name] for name in SAME} | {
    "distill": {"distill_dim": 12},
    "one-patch": {"img_size": 16},  # a chunk of one token is shorter than the convolution's state
    "ssm-bias": {"ssm_cfg": {"bias": True, "conv_bias": False, "expand": 1, "d_conv": 1}},
    "tokens": {"readout": "tokens"},
}


@pytest.mark.parametrize("overrides", CLASSIFIERS.values(), ids=CLASSIFIERS)
def test_classifier(overrides):
    plain, fast = models("VideoMamba", overrides)
    clip = clip_of(plain.config)
    wanted = results(plain, clip)
    for frames in (2, 3, 4) if overrides else (1, 3, 4, 7):
        if frames % plain.config.kernel_size == 0:
            fast.zero_grad(set_to_none=True)
            assert_same(results(InChunks(fast, chunk_frames=frames), clip), wanted)
            with torch.no_grad():
                got = flat(fast.forward_chunked(clip, chunk_frames=frames))
            assert_same(dict(enumerate(got)), {i: wanted[f"output {i}"] for i in range(len(got))})


ENCODERS = {
    "plain": {},
    "no-pool-norm": {"add_pool_norm": False},
    "no-decoder": {"clip_return_layer": 0, "pool_type": "cls_cat_avg"},
    "two-layers": {"depth": 3, "clip_return_layer": 2, "clip_norm_type": "none"},
    "unfused": {"fused_add_norm": False, "clip_return_layer": 2, "kernel_size": 2},
}


@pytest.mark.parametrize("temporal", [False, True], ids=["clip", "keep-temporal"])
@pytest.mark.parametrize("overrides", ENCODERS.values(), ids=ENCODERS)
def test_encoder(overrides, temporal):
    plain, fast = models("VideoMambaEncoder", overrides)
    clip, how = clip_of(plain.config), {"keep_temporal": temporal}
    wanted = results(plain, clip, **how)
    assert_same(results(InChunks(fast, chunk_frames=2), clip, **how), wanted)
    assert_same(results(Definition(plain, 2), clip, **how), wanted)


class Definition(InChunks):
    """The reference's chunks."""

    def __init__(self, model, frames):
        model.zero_grad(set_to_none=True)
        super().__init__(model)
        self.frames = frames

    def __call__(self, clip, **how):
        return reference.forward_chunked(self.model, clip, self.frames, **how)


def test_parameters_that_the_whole_clip_leaves_without_gradient():
    """Behind the layer whose residual stream is decoded, only the residual stream has one."""
    _, fast = models("VideoMambaEncoder", {"depth": 3, "add_pool_norm": False})
    clip, grads = clip_of(fast.config), []
    for run in (fast, InChunks(fast, chunk_frames=2)):
        fast.zero_grad(set_to_none=True)
        features = run(clip).clip
        (features * fill(*features.shape, phase=3)).sum().backward()
        grads.append({name: p.grad for name, p in fast.named_parameters()})
    assert {name for name, grad in grads[1].items() if grad is None} >= {"norm.weight", "layers.2.mixer.A_log"}
    assert_same(grads[1], grads[0])


def test_low_precision_keeps_to_the_rule():
    """bfloat16 parameters, and a residual stream that is rounded between layers, at one frame a chunk."""
    samples = []
    for seed in range(4):
        plain, fast = models("VideoMamba", {"residual_in_fp32": bool(seed % 2), "depth": 3})
        plain, fast = plain.bfloat16(), fast.bfloat16()
        clip = (clip_of(plain.config) + seed / 7).bfloat16()
        got = results(InChunks(fast, chunk_frames=1), clip)
        rounded = results(plain, clip)
        plain.zero_grad(set_to_none=True)
        truth = results(plain.double(), clip.double())
        samples.append((got, truth, rounded))
    assert_rule(samples)


def test_gradients_of_many_chunks_are_summed_in_float32():
    """A sum of ones in bfloat16 ends at 256."""
    _, fast = models("VideoMamba", {})
    parameters = LayerParameters.of(fast.bfloat16().layers[0])
    hidden = torch.zeros(1, 4, fast.config.embed_dim).bfloat16()
    weights = LayerWeights(layer_spec(fast.layers[0], parameters, hidden, None, [slice(0, 4)], "torch", False), parameters)
    for _ in range(300):
        weights.add_gradient(weights.in_proj.weight, torch.ones_like(weights.in_proj.weight))
    [found] = [grad for grad in weights.gradients() if grad is not None]
    assert found.dtype == torch.bfloat16 and (found == 300).all()


@pytest.mark.parametrize("layers", [torch.float32, torch.float64], ids=str)
def test_a_residual_stream_narrower_than_the_layers_is_kept_without_gradients_too(layers):
    _, fast = models("VideoMamba", {"fused_add_norm": False, "residual_in_fp32": False, "depth": 3})
    fast.bfloat16().layers.to(layers)
    clip = clip_of(fast.config).bfloat16()
    with torch.no_grad():
        got = fast.forward_chunked(clip, chunk_frames=2)
    assert torch.equal(got, fast.forward_chunked(clip, chunk_frames=2).detach())
    assert (got - fast(clip)).abs().max() < 0.02  # of outputs up to 0.2, in bfloat16


def test_iterator_and_host_memory_give_the_same_bits():
    _, fast = models("VideoMamba", {"kernel_size": 2, "distill_dim": 12})
    clip = clip_of(fast.config)
    sources: dict[str, Callable] = {
        "frames": lambda: iter(clip.unbind(2)),
        "runs": lambda: iter(clip.split((3, 1), dim=2)),
        "all": lambda: [clip],
    }
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            wanted = flat(fast.forward_chunked(clip, chunk_frames=2))
            for name, source in sources.items():
                got = flat(fast.forward_chunked(source(), chunk_frames=2, num_frames=4, offload=True))
                assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), name


def test_fewer_frames_take_the_first_positions():
    plain, fast = models("VideoMamba", {})
    short = reference.VideoMamba(reference.VideoMambaConfig(**{**vars(plain.config), "num_frames": 2})).double().eval()
    weights = plain.state_dict()
    weights["temporal_pos_embedding"] = weights["temporal_pos_embedding"][:, :2]
    short.load_state_dict(weights)
    clip = clip_of(plain.config)[:, :, :2]
    assert_same({"": fast.forward_chunked(clip, chunk_frames=1)}, {"": short(clip)})


def test_what_is_dropped_is_drawn_once_for_a_clip():
    """The same draws as for the whole clip: dropout of tokens, and of every layer's branch."""
    _, fast = models("VideoMamba", {"depth": 4, "drop_path_rate": 0.5, "drop_rate": 0.3, "fc_drop_rate": 0.2})
    fast.train()
    found = []
    for run in (fast, InChunks(fast, chunk_frames=1)):
        torch.manual_seed(3)
        fast.zero_grad(set_to_none=True)
        found.append(results(run, clip_of(fast.config)))
    assert_same(found[1], found[0])


def test_frozen_parameters_and_inputs():
    _, fast = models("VideoMamba", {})
    for name, p in fast.named_parameters():
        p.requires_grad_(name.startswith(("layers.1.mixer.in_proj", "head")))
    clip, grads = clip_of(fast.config), []
    for run in (fast, InChunks(fast, chunk_frames=3)):
        fast.zero_grad(set_to_none=True)
        run(clip).square().sum().backward()
        grads.append({name: p.grad for name, p in fast.named_parameters()})
    assert_same(grads[1], grads[0])


def peak(function: Callable[[], object]) -> int:
    """Bytes that PyTorch has allocated at once while a function runs, above those before."""
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile:
        function()
    events = [(e.start_ns(), e.nbytes()) for e in profile.kineto_results.events() if e.name() == "[memory]"]
    most = now = 0
    for _, size in sorted(events, key=lambda e: e[0]):
        now += size
        most = max(most, now)
    return most


def test_memory_is_that_of_a_chunk():
    """Twice the frames cost twice the streams that are kept whole, and nothing else."""
    depth, D, patches = 3, 32, 16
    own = {"img_size": 64, "depth": depth, "embed_dim": D, "num_classes": 3, "drop_path_rate": 0.0}
    infer, low, train = {}, {}, {}
    for frames in (16, 32):
        model = fused.VideoMamba(fused.VideoMambaConfig(num_frames=frames, **own))
        clip = fill(1, 3, frames, 64, 64, phase=1)
        with torch.no_grad():
            infer[frames] = peak(lambda m=model, x=clip: m.forward_chunked(x, chunk_frames=2))
            half, small = copy.deepcopy(model).bfloat16(), clip.bfloat16()
            low[frames] = peak(lambda m=half, x=small: m.forward_chunked(x, chunk_frames=2))

        def step(m=model, x=clip):
            m.forward_chunked(x, chunk_frames=2).sum().backward()
            m.zero_grad()

        train[frames] = peak(step)
    stream = 16 * patches * D * 4  # bytes of 16 frames more
    assert infer[32] - infer[16] <= 4.1 * stream  # residual, hidden, y_b
    assert low[32] - low[16] <= 2.6 * stream  # the residual in float32, hidden and y_b in half of that
    states = 8 * depth * 2 * D * (16 + 3) * 4  # at 8 borders more
    pixels = 16 * 3 * 64 * 64 * 4
    padding = 8 * 2 * D * 3 * 4  # of the convolution, whose x's gradient is a part of a longer one
    # a sum per layer; its gradient, those that come in, those of x, z and y_b
    assert train[32] - train[16] <= 1.02 * ((depth + 3 + 6) * 1.1 * stream + states + padding + pixels)  # by less than a stream


@pytest.mark.parametrize(("chunk", "ahead"), [(1, 0), (2, 2), (4, 2), (2, 4), (6, 0), (3, 1)])
def test_approximation_is_the_references(chunk, ahead):
    for kind, overrides in (
        ("VideoMamba", {"num_frames": 7}),
        ("VideoMambaEncoder", {"fused_add_norm": False, "num_frames": 6}),
    ):
        plain, fast = models(kind, overrides | {"depth": 3})
        clip = clip_of(plain.config)
        got = list(fast.forward_approximate(iter(clip.unbind(2)), chunk_frames=chunk, look_ahead=ahead))
        patches, frames = plain.config.patches, plain.config.num_frames
        sizes = [min(chunk, frames - start) * patches + (start == 0) for start in range(0, frames, chunk)]
        assert [x.shape[1] for x in got] == sizes
        assert_same({"": torch.cat(got, dim=1)}, {"": reference.approximate(plain, clip, chunk, ahead).detach()})


def test_approximation_is_exact_where_it_sees_the_end_or_need_not():
    for overrides, ahead in (({}, 3), ({"bimamba": False, "readout": "mean"}, 0)):
        _, fast = models("VideoMamba", overrides)
        clip = clip_of(fast.config)
        exact = fast.encode(fast.embed(clip))[0].detach()
        assert_same({"": torch.cat(list(fast.forward_approximate(clip, chunk_frames=1, look_ahead=ahead)), 1)}, {"": exact})
    _, fast = models("VideoMamba", {})
    near = torch.cat(list(fast.forward_approximate(clip_of(fast.config), chunk_frames=1)), 1)
    assert (near - fast.encode(fast.embed(clip))[0]).norm() > 1e-3 * near.norm()


def test_approximation_gives_a_chunk_as_soon_as_it_can():
    _, fast = models("VideoMamba", {"num_frames": 6})
    clip, taken = clip_of(fast.config), []

    def frames():
        for i, frame in enumerate(clip.unbind(2)):
            taken.append(i)
            yield frame

    given = fast.forward_approximate(frames(), chunk_frames=2, look_ahead=1)
    next(given)
    assert taken == [0, 1, 2]
    next(given)
    assert taken == [0, 1, 2, 3, 4]


def video(*shape: int) -> torch.Tensor:
    return torch.zeros(shape or (1, 3, 4, 32, 32))


def test_a_longer_video_stretches_the_temporal_table():
    plain, fast = models("VideoMamba", {})
    clip = fill(2, 3, 6, 32, 32, phase=1).double()
    for model in (plain, fast):
        with pytest.raises(ValueError, match="T|frames"):
            model(clip)
    wanted = fast(clip, temporal_pos_total=6)
    assert_same({"logits": fast.forward_chunked(clip, chunk_frames=4, temporal_pos_total=6)}, {"logits": wanted})
    windows = fast.forward_approximate(clip, chunk_frames=2, look_ahead=4, temporal_pos_total=6)
    assert_same({"logits": fast.head(torch.cat(list(windows), dim=1)[:, 0])}, {"logits": wanted})


WRONG = {
    "chunk": ({}, video(), {"chunk_frames": 0}, "chunk_frames is 0; allowed: a positive multiple of kernel_size"),
    "tubelet": ({"kernel_size": 2}, video(), {"chunk_frames": 3}, r"chunk_frames is 3; .* multiple of kernel_size \(2\)"),
    "odd": ({"kernel_size": 2}, video(1, 3, 3, 32, 32), {}, "num_frames is 3; allowed: a positive multiple of kernel_size"),
    "count": ({}, video(), {"num_frames": 3}, "num_frames is 3, but the clip has 4; leave it out"),
    "uncounted": ({}, iter([video()]), {}, "num_frames is None; an iterator's frames cannot be counted"),
    "fewer": ({}, iter([video(1, 3, 2, 32, 32)]), {"num_frames": 4}, "num_frames is 4, but the iterator gave 2"),
    "more": ({}, iter([video(), video()]), {"num_frames": 4}, "num_frames is 4, but the iterator gives more"),
    "table": (
        {},
        video(1, 3, 6, 32, 32),
        {},
        "there are temporal positions for 4; pass all its tubelets as temporal_pos_total",
    ),
    "sides": ({}, video(1, 3, 4, 32, 48), {}, r"allowed: runs of frames \(B, 3, t, 32, 32\) or single frames"),
    "dims": ({}, video(3, 4, 32, 32), {}, r"clip has shape \(3, 4, 32, 32\)"),
    "clips": ({}, iter([video(1, 3, 32, 32), video(2, 3, 32, 32)]), {"num_frames": 4}, r"gave \(2, 3, 32, 32\).* \(1, 3, t,"),
    "no-tensor": ({}, iter(["a.jpg"]), {"num_frames": 4}, "the iterator gave str; allowed: runs of frames"),
    "image": ({"num_frames": None}, video(), {}, "image model .* call the model itself"),
    "order": ({"scan_order": "both"}, video(), {}, "scan_order is 'both'; .* run the whole clip at once"),
}


@pytest.mark.parametrize(("overrides", "clip", "how", "says"), WRONG.values(), ids=WRONG)
def test_errors_say_what_to_do(overrides, clip, how, says):
    _, fast = models("VideoMamba", overrides)
    with pytest.raises(ValueError, match=says):
        fast.float().forward_chunked(clip, **{"chunk_frames": 2} | how)


def test_more_errors():
    _, fast = models("VideoMamba", {})
    with pytest.raises(TypeError, match=r"frames have dtype torch\.uint8"):
        fast.forward_chunked(video().byte(), chunk_frames=1)
    with pytest.raises(ValueError, match="look_ahead is -1; allowed: 0 or a positive multiple"):
        next(fast.forward_approximate(video(), chunk_frames=1, look_ahead=-1))
    with pytest.raises(ValueError, match="the video has 8 frames or more, but there are temporal positions for 4"):
        list(fast.float().forward_approximate(iter([video(), video()]), chunk_frames=1))
    with pytest.raises(ValueError, match="the iterator gave no frames"):
        next(fast.forward_approximate(iter([]), chunk_frames=1))
    rival = fused.VideoMamba(fused.VideoMambaConfig(img_size=32, depth=1, embed_dim=32, num_frames=4), backend="mamba_ssm")
    with pytest.raises(ValueError, match="'mamba_ssm' cannot carry a state .* backend='native' or 'torch'"):
        rival.forward_chunked(video(), chunk_frames=1)
