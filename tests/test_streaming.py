"""Videos in chunks, by both packages; in float64 but for tests of a dtype."""

import copy
import re
from functools import cache, partial
from itertools import pairwise
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from golden import fill, golden
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rule import assert_rule
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from toy_models import TOY, flat

import fused
import reference
from fused.io.video import read_clip, read_frames
from harness.fixtures.video import SHIPPED

LENGTHS = (None, 1, 3, 4, 7, 12)  # of a video in tubelets; the temporal table has 4


@cache
def model_of(package: ModuleType, kind: str = "VideoMamba", **overrides):
    return golden(getattr(package, kind)(package.VideoMambaConfig(**TOY | overrides))).double()


def video(frames: int = 4, clips: int = 2) -> Tensor:
    return fill(clips, 3, frames, 32, 32, phase=7).double()


def close(got: Tensor, truth: Tensor) -> bool:
    """Return whether float64 results agree to 1e-12 in the L2 norm and in the largest absolute value."""
    assert got.shape == truth.shape and got.dtype == truth.dtype
    error = got - truth
    return bool(error.norm() <= 1e-12 * truth.norm() and error.abs().max() <= 1e-12 * truth.abs().max())


@pytest.mark.parametrize("tubelet", [1, 2])
@pytest.mark.parametrize("total", LENGTHS)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_embedded_chunks_are_the_embedded_video(package, total, tubelet, masked):
    """CLS occurs once, positions are those of the whole video, and every chunk reads the same stretched table."""
    model = model_of(package, num_frames=4 * tubelet, kernel_size=tubelet)
    tubelets = total or 4
    clip, mask = video(tubelets * tubelet), None
    if masked:
        mask = torch.zeros(2, 1 + tubelets * 4, dtype=torch.bool)
        mask[0, 1::4], mask[1, 2::4] = True, True
    whole = model.embed(clip, mask, temporal_pos_total=total)
    for cuts in {(0, tubelets), tuple(range(tubelets + 1)), (0, 1, tubelets) if tubelets > 1 else (0, 1)}:
        parts = []
        for start, stop in pairwise(cuts):
            part = None if mask is None else mask[:, 1 + 4 * start - (start == 0) : 1 + 4 * stop]
            chunk = clip[:, :, tubelet * start : tubelet * stop]
            parts.append(model.embed(chunk, part, temporal_pos_offset=start, temporal_pos_total=total))
        assert close(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("total", LENGTHS[1:])
def test_a_stretched_table_is_upstreams(package, total):
    model = copy.deepcopy(model_of(package))
    with torch.no_grad():
        model.patch_embed.proj.weight.zero_()
        model.patch_embed.proj.bias.zero_()
        model.pos_embed.zero_()
    got = model.embed(video(total), temporal_pos_total=total)[:, 1::4]
    table = model.temporal_pos_embedding
    assert close(got[0], F.interpolate(table.transpose(1, 2), size=total, mode="linear").transpose(1, 2)[0])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("frames", "how", "says"),
    [
        (2, {"temporal_pos_offset": -1}, "temporal_pos_offset is -1.*from 0 up"),
        (2, {"temporal_pos_offset": 1.0}, "temporal_pos_offset is 1.0.*from 0 up"),
        (2, {"temporal_pos_offset": True}, "temporal_pos_offset is True.*from 0 up"),
        (2, {"temporal_pos_total": 0}, "temporal_pos_total is 0.*from 1 up"),
        (3, {"temporal_pos_offset": 0}, r"3 frames.*multiples of kernel_size \(2\).*next chunk"),
        (0, {"temporal_pos_offset": 0}, r"0 frames.*multiples of kernel_size \(2\)"),
        (4, {"temporal_pos_offset": 3}, "temporal_pos_offset is 3.*past.* 4.*temporal_pos_total.*stretched"),
        (4, {"temporal_pos_offset": 5, "temporal_pos_total": 6}, "temporal_pos_offset is 5.*past.* 6.*temporal_pos_total"),
        (4, {}, r"clip has shape .*\(B, 3, 8, 32, 32\)"),
        (8, {"temporal_pos_total": 6}, r"clip has shape .*\(B, 3, 12, 32, 32\)"),
        (2, {"temporal_pos_offset": 0, "use_image": True}, "temporal_pos_offset is 0.*image"),
        (2, {"temporal_pos_total": 4, "use_image": True}, "temporal_pos_total is 4.*image"),
    ],
)  # fmt: skip
def test_a_chunk_that_is_no_part_of_the_video(package, frames, how, says):
    with pytest.raises(ValueError, match=says):
        model_of(package, num_frames=8, kernel_size=2).embed(video(frames), **how)


@pytest.mark.usefixtures("unchecked")
def test_an_image_model_has_no_time(package):
    with pytest.raises(ValueError, match="temporal_pos_offset is 0.*image"):
        model_of(package, num_frames=None).embed(video()[:, :, 0], temporal_pos_offset=0)


@pytest.mark.usefixtures("unchecked")
def test_a_chunk_of_another_size(package):
    with pytest.raises(ValueError, match=r"clip has shape .*\(B, 3, T, 32, 32\)"):
        model_of(package).embed(video()[..., :16], temporal_pos_offset=0)


@pytest.mark.usefixtures("unchecked")
def test_the_mask_of_a_chunk_is_its_own(package):
    model, chunk = model_of(package), video(2)
    with pytest.raises(ValueError, match=r"mask is torch.bool \(2, 9\); allowed is bool \(2, 8\)"):
        model.embed(chunk, torch.zeros(2, 9, dtype=torch.bool), temporal_pos_offset=2)


@pytest.mark.parametrize("order", ["temporal", "both"])
def test_a_mask_over_more_tubelets_than_the_table_has(order):
    mask = torch.zeros(2, 1 + 6 * 4, dtype=torch.bool)
    mask[0, 3], mask[1, 24] = True, True
    outputs = []
    for package in (reference, fused):
        model = model_of(package, scan_order=order)
        outputs.append(model.encode(model.embed(video(6), mask, temporal_pos_total=6), mask)[0])
    assert close(outputs[1], outputs[0])


# Each model that streams, and how its outputs for chunks make up the whole's: side by side, or the last alone.
STREAMS = {
    "mean": ("VideoMamba", {"readout": "mean"}, ["last"]),
    "last": ("VideoMamba", {"readout": "last", "kernel_size": 2, "num_frames": 8}, ["last"]),
    "tokens": ("VideoMamba", {"readout": "tokens", "fused_add_norm": False}, [1]),
    "distill": ("VideoMamba", {"readout": "last", "distill_dim": 7}, ["last", 1]),
    "avg": ("VideoMambaEncoder", {"pool_type": "avg"}, [1, "last", 2]),
    "last pooled": ("VideoMambaEncoder", {"pool_type": "last", "clip_return_layer": 2}, [1, "last", 2]),
    "all tokens": ("VideoMambaEncoder", {"add_pool_norm": False, "clip_return_layer": 0, "ssm_cfg": {"d_conv": 2}}, [1]),
}


def streamer(package: ModuleType, name: str, **overrides):
    kind, own, joins = STREAMS[name]
    own = own | overrides
    frozen = {k: tuple(v.items()) if isinstance(v, dict) else v for k, v in own.items()}
    return _streamer(package, kind, **frozen), joins


@cache
def _streamer(package: ModuleType, kind: str, **own):
    own = {k: dict(v) if isinstance(v, tuple) else v for k, v in own.items()}
    config = package.VideoMambaConfig(**TOY | {"bimamba": False} | own)
    return golden(getattr(package, kind)(config)).double().eval()


def tensors(state) -> list[Tensor]:
    return [x for entry in (state.values() if isinstance(state, dict) else state) for x in entry]


def streamed(model, clip: Tensor, cuts, joins: list, state=None, window=None, run=None, **how):
    """Return the joined outputs of chunks that begin at the tubelets `cuts`, and the last state.

    `window` is applied to the state between two chunks, `run` replaces the call of the model. The given state stays unchanged.
    """
    t, outputs = model.config.kernel_size, []
    for start, stop in pairwise((*cuts, clip.shape[2] // t)):
        came = [x.clone() for x in tensors(state)] if state is not None else []
        chunk = {"ssm_state": state, "return_state": True, "temporal_pos_offset": start, **how}
        out, after = (run or model)(clip[:, :, t * start : t * stop], **chunk)
        assert all(torch.equal(x, y) for x, y in zip(came, tensors(state) if came else [], strict=True))
        outputs.append(flat(out))
        state = after if window is None else window(after)
    joined = [
        parts[-1] if join == "last" else torch.cat(parts, dim=join)
        for parts, join in zip(zip(*outputs, strict=True), joins, strict=True)
    ]
    return joined, state


def gradients(model, results: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    floating = [x for x in results if x.is_floating_point()]
    loss = torch.stack([(x * fill(*x.shape, phase=3).to(x)).sum() for x in floating]).sum()
    found = torch.autograd.grad(loss, [*leaves, *model.parameters()], allow_unused=True)
    return [torch.zeros(()) if g is None else g for g in found]


def assert_all_close(got: list[Tensor], truth: list[Tensor]) -> None:
    assert len(got) == len(truth) and all(close(x.double(), y.double()) for x, y in zip(got, truth, strict=True))


@pytest.mark.parametrize("name", STREAMS)
@settings(max_examples=2, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(places=st.sets(st.integers(1, 4)), total=st.sampled_from([None, 5]))
def test_chunks_are_the_video(package, name, places, total):
    """Outputs, final state, and the gradients of the clip, of the parameters and of the initial state agree."""
    model, joins = streamer(package, name)
    cuts = (0, *sorted(places - {4 if total is None else 5}))
    clip = video((total or 4) * model.config.kernel_size).requires_grad_()
    state = [tuple(x + 0.1 if x.is_floating_point() else x for x in pair) for pair in model.init_state(2)]
    leaves = [x.requires_grad_() for x in tensors(state) if x.is_floating_point()]
    results = []
    for parts in (cuts, (0,)):
        outputs, after = streamed(model, clip, parts, joins, state, temporal_pos_total=total)
        results.append([*outputs, *tensors(after), *gradients(model, [*outputs, *tensors(after)], [clip, *leaves])])
    assert_all_close(*results)
    alone = model(clip, temporal_pos_total=total)
    assert_all_close(flat(alone), streamed(model, clip, (0,), joins, temporal_pos_total=total)[0])


@pytest.mark.parametrize("name", ["mean", "avg"])
def test_a_running_mean_is_that_of_the_video_so_far(package, name):
    model, _ = streamer(package, name)
    clip, state = video(), model.init_state(2)
    for i in range(4):
        out, state = model(clip[:, :, i : i + 1], ssm_state=state, return_state=True, temporal_pos_offset=i)
        so_far, _ = model(clip[:, :, : i + 1], return_state=True)
        assert close(flat(out)[-2 if name == "avg" else 0], flat(so_far)[-2 if name == "avg" else 0])
    assert state[-1][0].item() == 16 and state[-1][0].dtype == torch.int64


def test_masked_chunks_and_pooled_tubelets(package):
    model, _ = streamer(package, "avg")
    mask = torch.zeros(2, 17, dtype=torch.bool)
    mask[0, 1::4], mask[1, 2::4] = True, True
    clip, state, parts = video(), None, []
    whole, _ = model(clip, mask, keep_temporal=True, return_state=True)
    for start, stop in ((0, 1), (1, 4)):
        own = mask[:, 1 + 4 * start - (start == 0) : 1 + 4 * stop]
        out, state = model(
            clip[:, :, start:stop], own, keep_temporal=True, ssm_state=state, return_state=True, temporal_pos_offset=start
        )
        parts.append(out)
    for field, dim in (("tokens", 1), ("pooled", 1), ("clip", 2)):
        assert close(torch.cat([getattr(p, field) for p in parts], dim=dim), getattr(whole, field))


def test_the_mixer_token_by_token(package):
    mixer, x = golden(package.Mamba(8, d_state=4, bimamba=False, layer_idx=3)).double(), fill(2, 6, 8, phase=7).double()
    state, outputs = mixer.init_state(2), []
    for i in range(6):
        out, state = mixer(x[:, i : i + 1], state=state, return_state=True)
        outputs.append(out)
    whole, after = mixer(x, return_state=True)
    assert_all_close([torch.cat(outputs, dim=1), *state], [whole, *after])


@pytest.mark.parametrize("container", [list, tuple, lambda pairs: dict(enumerate(pairs))], ids=["list", "tuple", "dict"])
def test_a_state_keeps_its_kind_of_container(package, container, tmp_path):
    """It does so through a file, which holds the numbers of the state only."""
    model, joins = streamer(package, "mean")
    clip = video()
    _, state = streamed(model, clip[:, :, :2], (0,), joins, container(model.init_state(2)))
    assert type(state) is type(container([]))
    torch.save(package.detach_state(state), tmp_path / "state.pt")
    assert (tmp_path / "state.pt").stat().st_size < 1.5 * sum(x.nbytes for x in tensors(state)) + 8192
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    got = model(clip[:, :, 2:], ssm_state=loaded, temporal_pos_offset=2)
    assert type(loaded) is type(state) and torch.equal(got, model(clip[:, :, 2:], ssm_state=state, temporal_pos_offset=2))


def test_truncated_backpropagation_ends_at_the_window(package):
    """Gradients are those with a constant state; without `detach_state` they are those of the whole video (see above)."""
    model, joins = streamer(package, "last")
    clip = video(8).requires_grad_()
    outputs, _ = streamed(model, clip, (0, 2), joins, window=package.detach_state)
    got = gradients(model, outputs, [clip])
    assert not got[0][:, :, :4].any() and got[0][:, :, 4:].any()
    with torch.no_grad():
        _, constant = model(clip[:, :, :4], return_state=True)
    late = clip.detach()[:, :, 4:].requires_grad_()
    truth = gradients(model, flat(model(late, ssm_state=constant, temporal_pos_offset=2)), [late])
    assert close(got[0][:, :, 4:], truth[0])
    assert_all_close(got[1:], truth[1:])


@pytest.mark.parametrize("how", ["by chunk", "by mixer"])
def test_checkpoints_change_no_bit(package, how):
    wrapped = {"use_checkpoint": True, "checkpoint_num": 1} if how == "by mixer" else {}
    model, joins = streamer(package, "mean")
    twin, _ = streamer(package, "mean", **wrapped)
    runs = [None, partial(checkpoint, twin, use_reentrant=False) if how == "by chunk" else None]
    found = []
    for network, run in zip((model, twin), runs, strict=True):
        clip = video().requires_grad_()
        outputs, state = streamed(network, clip, (0, 1, 2), joins, run=run)
        found.append([*outputs, *gradients(network, [*outputs, *tensors(state)], [clip])])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@pytest.mark.parametrize("way", ["autocast", "cast"])
def test_low_precision_in_chunks_keeps_to_the_tolerance_rule(way):
    """Tokens, mean and final state of both packages in single tubelets; plain is the reference over the whole video."""
    exact, joins = streamer(reference, "avg")
    samples = []
    for phase in range(3):
        clip = fill(2, 3, 4, 32, 32, phase=phase).to(torch.bfloat16)
        models = [copy.deepcopy(streamer(package, "avg")[0]) for package in (reference, fused)]
        plain, fast = (m.float() if way == "autocast" else m.to(torch.bfloat16).float() for m in models)
        truth = copy.deepcopy(plain).double()
        if way == "cast":
            plain, fast = plain.to(torch.bfloat16), fast.to(torch.bfloat16)
        given = clip if way == "cast" else clip.float()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            state = plain.init_state(2)
            assert {x.dtype for x, _ in state[:-1]} == {torch.bfloat16} and {x.dtype for _, x in state} == {torch.float32}
            runs = [streamed(m, given, cuts, joins, m.init_state(2))
                    for m, cuts in ((plain, (0,)), (plain, (0, 1, 2, 3)), (fast, (0, 1, 2, 3)))]  # fmt: skip
        with torch.no_grad():
            runs.append(streamed(truth, clip.double(), (0,), joins))
        named = [dict(enumerate([*out, *(x for x in tensors(after) if x.is_floating_point())])) for out, after in runs]
        samples += [(named[1], named[3], named[0]), (named[2], named[3], named[0])]
    for one in (samples[::2], samples[1::2]):
        assert_rule([({str(k): v for k, v in got.items()}, *({str(k): v.double() for k, v in x.items()} for x in rest))
                     for got, *rest in one])  # fmt: skip


def test_a_state_made_in_inference_mode_serves_training(package):
    model, joins = streamer(package, "mean")
    clip = video()
    with torch.inference_mode():
        got, state = streamed(model, clip[:, :, :2], (0, 1), joins, model.init_state(2))
    assert state[0][0].is_inference()
    out = model(clip[:, :, 2:], ssm_state=package.detach_state(state), temporal_pos_offset=2)
    gradients(model, [out], [])
    assert_all_close([out], [model(clip)])


def test_state_to(package):
    model, _ = streamer(package, "mean")
    state = model.init_state(2, dtype=torch.bfloat16)
    for entry in package.state_to(state, dtype=torch.float64):
        assert entry[1].dtype == torch.float64 and entry[0].dtype in (torch.float64, torch.int64)
    back = package.state_to(package.state_to(state, dtype=torch.float64), dtype=torch.bfloat16)
    assert [x.dtype for x in tensors(back)] == [x.dtype for x in tensors(state)]
    moved = package.state_to({0: state[0]}, "meta")
    assert moved[0][0].device.type == "meta" and moved[0][0].dtype == torch.bfloat16
    leaf = torch.zeros(2, 64, 3, requires_grad=True)
    assert package.state_to((leaf, leaf), dtype=torch.float64)[0].grad_fn is not None
    for function in (package.state_to, package.detach_state):
        with pytest.raises(TypeError, match="state is a int; allowed: what `init_state`"):
            function(3)


def spoiled(state, layer: int, part: int, change):
    pairs = [list(pair) for pair in state]
    pairs[layer][part] = change(pairs[layer][part])
    return [tuple(pair) for pair in pairs]


BAD = {
    "few": (lambda s: s[:2], ValueError, r"ssm_state has 2 entries; allowed: one per layer \(2\).*running mean"),
    "many": (lambda s: [*s, s[0]], ValueError, "ssm_state has 4 entries"),
    "keys": (lambda s: dict(zip((0, 1, 5), s, strict=True)), ValueError, r"ssm_state has the keys .*5.*0 to 2"),
    "a tensor": (lambda s: s[0][0], TypeError, "ssm_state is a Tensor; allowed: a? ?list, tuple or dict"),
    "bare": (lambda s: [x for _, x in s], TypeError, r"entry 0 of ssm_state is no.*\(conv_state, ssm_state\)"),
    "bare mean": (lambda s: [*s[:2], s[2][1]], TypeError, r"entry 2 of ssm_state is no.*\(count, total\)"),
    "other clips": (lambda s: [tuple(x[:1] if x.dim() else x for x in p) for p in s], ValueError,
                    r"conv_state of layer 0 has shape \(1, 64, 3\); allowed: \(2, 64, 3\).*clips"),
    "conv": (lambda s: spoiled(s, 1, 0, lambda x: x[..., 1:]), ValueError, r"conv_state of layer 1 .*\(2, 64, 2\); allowed: "),
    "scan": (lambda s: spoiled(s, 1, 1, lambda x: x[..., 1:]), ValueError, r"ssm_state of layer 1 .*\(2, 64, 15\); allowed: "),
    "conv dtype": (lambda s: spoiled(s, 0, 0, torch.Tensor.half), TypeError, "conv_state of layer 0 is torch.float16.*float64"),
    "scan dtype": (lambda s: spoiled(s, 1, 1, torch.Tensor.float), TypeError, "ssm_state of layer 1 is .*float32.*state_to"),
    "device": (lambda s: spoiled(s, 0, 1, lambda x: x.to("meta")), ValueError, "ssm_state of layer 0 is on meta.*state_to"),
    "count": (lambda s: spoiled(s, 2, 0, torch.Tensor.float), TypeError, "count of the running mean is torch.float32"),
    "total": (lambda s: spoiled(s, 2, 1, lambda x: x[:, 1:]), ValueError, r"total of the running mean .*\(2, 31\)"),
}  # fmt: skip


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("bad", BAD)
def test_a_state_that_does_not_fit_raises_and_the_right_one_still_serves(package, bad):
    model, joins = streamer(package, "mean")
    spoil, error, says = BAD[bad]
    clip = video()
    _, state = model(clip[:, :, :2], return_state=True)
    with pytest.raises(error, match=says):
        model(clip[:, :, 2:], ssm_state=spoil(state), return_state=True, temporal_pos_offset=2)
    assert close(model(clip[:, :, 2:], ssm_state=state, temporal_pos_offset=2), model(clip))


@pytest.mark.usefixtures("unchecked")
def test_errors_of_streams(package):
    model, clip = streamer(package, "mean")[0], video(2)
    both = model_of(package, readout="mean")
    state = model.init_state(2)
    for how in ({"ssm_state": state, "temporal_pos_offset": 0}, {"return_state": True}, {"temporal_pos_offset": 2}):
        with pytest.raises(ValueError, match="bidirectional model.*future.*whole clip.*bimamba=False"):
            both(clip, **how)
    tokens = torch.zeros(2, 3, TOY["embed_dim"])
    for call in (lambda: both.init_state(2), lambda: both.layers[0].mixer(tokens, return_state=True)):
        with pytest.raises(ValueError, match="bidirectional mixer.*bimamba=False"):
            call()
    with pytest.raises(ValueError, match="temporal_pos_offset is 2 .*ssm_state.*init_state"):
        model(clip, temporal_pos_offset=2)
    with pytest.raises(ValueError, match="ssm_state.*tubelets.*init_state"):
        model(clip, ssm_state=state)
    with pytest.raises(ValueError, match="temporal_pos_offset is 3.*past.*temporal_pos_total"):
        model(clip, ssm_state=state, temporal_pos_offset=3)
    encoder, _ = streamer(package, "avg")
    image, _ = streamer(package, "mean", num_frames=None)
    for call in (
        lambda: encoder(clip[:, :, :1], use_image=True, return_state=True),
        lambda: image(clip[:, :, 0], return_state=True),
    ):
        with pytest.raises(ValueError, match="image.*use_image"):
            call()
    for batch in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"batch_size is {batch!r}; allowed"):
            model.init_state(batch)
    with pytest.raises(TypeError, match="dtype is torch.int64; allowed: .*stream|dtype is torch.int64; allowed is"):
        model.init_state(2, dtype=torch.int64)


@pytest.mark.parametrize("pool", ["cls", "cls+avg", "cls_cat_avg"])
def test_cls_is_no_readout_of_a_causal_model(package, pool):
    """The message gives the reason and the allowed values; bidirectional models keep upstream's default."""
    config = package.VideoMambaConfig(**TOY, bimamba=False, pool_type=pool)
    with pytest.raises(ValueError, match="readout is 'cls'.*causal.*nothing of.* video.*'mean'.*'last'.*'tokens'"):
        package.VideoMamba(config)
    with pytest.raises(ValueError, match=re.escape(f"pool_type is '{pool}'") + ".*causal.*'avg'.*'last'.*add_pool_norm=False"):
        package.VideoMambaEncoder(config)
    assert package.VideoMambaConfig().readout == "cls"


def test_the_shipped_clip_frame_by_frame_from_the_decoder(package):
    """The clip has four times as many frames as the temporal table has positions."""
    model, _ = streamer(package, "mean", img_size=48)
    model = copy.deepcopy(model).float()
    state, count, last = model.init_state(1), 16, None
    with torch.inference_mode():
        for i, frame in enumerate(read_frames(SHIPPED, count, 48)):
            last, state = model(
                frame[None, :, None], ssm_state=state, return_state=True, temporal_pos_offset=i, temporal_pos_total=count
            )
        clip = read_clip(SHIPPED, count, 48)[None]
        at_once, truth = model(clip, temporal_pos_total=count), model.double()(clip.double(), temporal_pos_total=count)
    assert int(state[-1][0]) == count * 9 and not torch.equal(at_once, torch.zeros_like(at_once))
    assert_rule([({"logits": last}, {"logits": truth}, {"logits": at_once.double()})])
