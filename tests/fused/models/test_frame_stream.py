"""Frames one by one: bit for bit what the model itself gives for chunks of one tubelet, in memory that is written in place."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import fill, golden
from tape import TapeRecorder
from torch import Tensor

import fused
from fused import FrameStream, VideoMamba, VideoMambaConfig, VideoMambaEncoder
from fused.models.videomamba import frame_stream

TOY = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_frames": 4, "num_classes": 5, "bimamba": False, "readout": "mean"}


def model_of(dtype: torch.dtype = torch.float32, **overrides: Any) -> VideoMamba:
    return golden(VideoMamba(VideoMambaConfig(**TOY | overrides))).to(dtype)


def video(model: VideoMamba, tubelets: int, clips: int = 2, phase: int = 7) -> Tensor:
    frames = tubelets * model.config.kernel_size
    return fill(clips, 3, frames, 32, 32, phase=phase).to(model.cls_token.dtype)


@torch.no_grad()
def by_chunks(model: VideoMamba, clip: Tensor, total: int | None) -> list[Any]:
    """The model's own outputs, tubelet by tubelet."""
    t, state, outputs = model.config.kernel_size, None, []
    for i, chunk in enumerate(clip.split(t, dim=2)):
        place = {"ssm_state": state, "temporal_pos_offset": i} if i else {}
        if i == 0 and total is not None:
            place = {"ssm_state": model.init_state(len(clip)), "temporal_pos_offset": 0}
        out, state = model(chunk, return_state=True, temporal_pos_total=total, **place)
        outputs.append(out)
    return outputs


def by_frames(stream: FrameStream, clip: Tensor, tubelet: int) -> list[Any]:
    return [stream(chunk.squeeze(2) if tubelet == 1 else chunk) for chunk in clip.split(tubelet, dim=2)]


def assert_bits(got: list[Any], wanted: list[Any]) -> None:
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        assert type(one) is type(other)
        for a, b in zip(*((x,) if isinstance(x, Tensor) else x for x in (one, other)), strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b) and not a.requires_grad


@pytest.mark.parametrize(
    ("overrides", "total"),
    [
        ({}, None), ({}, 4), ({}, 6), ({}, 3), ({"readout": "last"}, 6), ({"readout": "tokens", "num_classes": 0}, 6),
        ({"kernel_size": 2, "num_frames": 8}, 6), ({"distill_dim": 6}, 6), ({"fused_add_norm": False, "stride": 8}, 6),
        ({"rms_norm": False, "residual_in_fp32": False, "ssm_cfg": {"d_conv": 6, "expand": 1}, "patch_size": 32}, 6),
    ],
)  # fmt: skip
def test_a_frame_is_a_chunk_of_one(overrides: dict[str, Any], total: int | None) -> None:
    model = model_of(torch.bfloat16 if total == 6 else torch.float32, **overrides)
    tubelet = model.config.kernel_size
    stream = FrameStream(model, 2, total)
    for phase, tubelets in ((7, 2), (3, total or 4)):  # a second video after the first, as if that had not been
        clip = video(model, tubelets, phase=phase)
        wanted = by_chunks(model, clip, total)
        assert_bits(by_frames(stream, clip, tubelet), wanted)
        assert stream.frames == clip.shape[2]
        stream.reset()
        assert stream.frames == 0


def test_under_autocast() -> None:
    """The autocast at its making is the stream's."""
    model = model_of()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stream, wanted = FrameStream(model, 2), by_chunks(model, video(model, 4), None)
    assert_bits(by_frames(stream, video(model, 4), 1), wanted)
    assert wanted[0].dtype == torch.bfloat16


def test_made_and_used_in_inference_mode_or_not() -> None:
    model = model_of()
    wanted = by_chunks(model, video(model, 4), None)
    with torch.inference_mode():
        stream = FrameStream(model, 2)
        first = by_frames(stream, video(model, 4)[:, :, :2], 1)
    assert_bits(first + by_frames(stream, video(model, 4)[:, :, 2:], 1), wanted)


def test_outputs_are_the_callers_and_frames_too() -> None:
    """What was returned stays as it was, and a frame may be overwritten at once."""
    model = model_of(readout="tokens")
    wanted = by_chunks(model, video(model, 4), None)
    stream, got = FrameStream(model, 2), []
    for frame in video(model, 4).unbind(2):
        mine = frame.clone()
        got.append(stream(mine))
        mine.fill_(float("nan"))
    assert_bits(got, wanted)


@pytest.mark.parametrize("overrides", [{}, {"distill_dim": 6}, {"readout": "last"}])
def test_replayed(overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs before the recording leave no trace, a replay reads what is new, and its output is copied."""
    recorder, model = TapeRecorder(), model_of(**overrides)
    monkeypatch.setattr(frame_stream, "CudaRecorder", lambda device: recorder)
    monkeypatch.setattr(FrameStream, "_takes_graph", lambda self, wanted, device: True)
    stream = FrameStream(model, 2, total=6)
    for phase in (7, 3):
        clip = video(model, 6, phase=phase)
        assert_bits(by_frames(stream, clip, 1), by_chunks(model, clip, 6))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.25)
        stream.reset()  # reads the table of positions again
    assert [tape.replays for tape in recorder.tapes] == [10]  # every frame but the first of each video


def test_other_weights_after_a_reset() -> None:
    model = model_of()
    stream = FrameStream(model, 2, total=7)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.25)
    stream.reset()
    clip = video(model, 7)
    assert_bits(by_frames(stream, clip, 1), by_chunks(model, clip, 7))


def test_no_frame_costs_memory() -> None:
    """As many tensors after many frames as after few."""
    earlier = [x for x in gc.get_objects() if type(x) is Tensor]  # held, so that no tensor of another test goes meanwhile
    model = model_of()
    stream, frame = FrameStream(model, 1, total=60), video(model, 1, clips=1)[:, :, 0]

    def alive() -> tuple[int, int]:
        gc.collect()
        found = [x for x in gc.get_objects() if type(x) is Tensor]
        return len(found) - len(earlier), sum(x.nbytes for x in found)

    counts = []
    for i in range(60):
        stream(frame)
        if i in (10, 59):
            counts.append(alive())
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: FrameStream(model_of(bimamba=True)), ValueError, "bidirectional"),
        (lambda: FrameStream(model_of(num_frames=None)), ValueError, "image"),
        (lambda: FrameStream(model_of(scan_order="temporal")), ValueError, "scan_order is 'temporal'"),
        (lambda: FrameStream(model_of().train()), ValueError, r"training mode.*model.eval\(\)"),
        (lambda: FrameStream(torch.nn.Linear(2, 2)), TypeError, "model is a Linear; allowed: a VideoMamba"),
        (lambda: FrameStream(encoder()), TypeError, "model is a VideoMambaEncoder; allowed: a VideoMamba"),
        (lambda: FrameStream(model_of(), 0), ValueError, "batch_size is 0"),
        (lambda: FrameStream(model_of(), total=0), ValueError, "total is 0; allowed: .* from 1 up"),
        (lambda: FrameStream(model_of(), total=2.0), ValueError, "total is 2.0"),
        (lambda: FrameStream(model_of(), graph=True), ValueError, "graph is True, but the model is on cpu"),
        (lambda: FrameStream(on("mamba_ssm")), ValueError, "mamba_ssm.*initial_state"),
        (lambda: FrameStream(on("native")), fused.BackendError, "native.*CUDA"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_streamed(make: Callable[[], FrameStream], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()


def encoder() -> VideoMambaEncoder:
    return VideoMambaEncoder(VideoMambaConfig(**TOY | {"add_pool_norm": False})).eval()


def on(backend: str) -> VideoMamba:
    return VideoMamba(VideoMambaConfig(**TOY), backend=backend).eval()


@pytest.mark.parametrize(
    ("frame", "error", "says"),
    [
        (torch.zeros(1, 3, 32, 32), ValueError, r"frame is \(1, 3, 32, 32\); allowed: \(2, 3, 32, 32\) or \(2, 3, 1, 32, 32\)"),
        (torch.zeros(2, 3, 2, 32, 32), ValueError, r"frame is \(2, 3, 2, 32, 32\)"),
        (torch.zeros(2, 3, 32, 16), ValueError, r"frame is \(2, 3, 32, 16\)"),
        (torch.zeros(2, 3, 32, 32).half(), TypeError, "frame is torch.float16; allowed: torch.float32"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), TypeError, "frame is torch.uint8"),
        (None, ValueError, "frame is NoneType"),
        (torch.zeros(3, 32, 32), ValueError, r"frame is \(3, 32, 32\); allowed: \(2, 3, 32, 32\) or \(2, 3, 1, 32, 32\)$"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_frame_that_does_not_fit(frame: Any, error: type[Exception], says: str) -> None:
    stream = FrameStream(model_of(), 2)
    with pytest.raises(error, match=says):
        stream(frame)
    assert stream.frames == 0


@pytest.mark.parametrize("tubelet", [1, 2])
def test_frames_without_a_batch_are_of_one_video(tubelet: int) -> None:
    model = model_of(kernel_size=tubelet)
    stream, clip = FrameStream(model, total=4), video(model, 4, clips=1)
    wanted = by_frames(stream, clip, tubelet)
    stream.reset()
    chunks = [chunk[0] for chunk in clip.split(tubelet, dim=2)]
    assert_bits([stream(chunk.squeeze(1) if tubelet == 1 else chunk) for chunk in chunks], wanted)
    stream.reset()
    assert_bits([stream(chunk) for chunk in chunks], wanted)  # (C, t, H, W)
    stream.reset()
    with pytest.raises(ValueError, match=r"allowed: .*\(3, 1, 32, 32\)$" if tubelet == 1 else r"or \(3, 2, 32, 32\)$"):
        stream(torch.zeros(3, 32, 16))


def test_frames_of_a_file_go_in_as_they_are() -> None:
    """Frames of `read_frames` go into all that takes frames: a stream, and a model in chunks."""
    pytest.importorskip("av", reason="PyAV is not installed")
    from fused.io.video import read_clip, read_frames

    path = Path(__file__).resolve().parents[2] / "data" / "bigbuckbunny.mp4"
    clip = read_clip(path, 4, 32)[None]
    causal, model = model_of(), model_of(bimamba=True, readout="cls")
    stream = FrameStream(causal)
    assert_bits([stream(frame) for frame in read_frames(path, 4, 32)], by_chunks(causal, clip, None))
    with torch.no_grad():
        wanted = model.forward_chunked(clip, chunk_frames=2)
        got = model.forward_chunked(read_frames(path, 4, 32), chunk_frames=2, num_frames=4)
        assert torch.equal(got, wanted)
        videos = clip, read_frames(path, 4, 32)
        tokens = [torch.cat(list(model.forward_approximate(x, chunk_frames=2, look_ahead=2)), 1) for x in videos]
        assert torch.equal(*tokens)


def test_frames_of_an_iterator_that_do_not_fit() -> None:
    model = model_of(bimamba=True, readout="cls")
    for shapes, says in (
        ([(3, 32, 16)], r"the iterator gave \(3, 32, 16\); .* or single frames \(B, 3, 32, 32\) or \(3, 32, 32\)$"),
        ([(2, 3, 32, 32), (3, 32, 32)], r"the iterator gave \(3, 32, 32\); .* or single frames \(2, 3, 32, 32\)$"),
        ([(32, 32)], r"the iterator gave \(32, 32\)"),
    ):
        with pytest.raises(ValueError, match=says):
            model.forward_chunked(map(torch.zeros, shapes), chunk_frames=2, num_frames=2)


def test_past_the_table_and_in_training_mode() -> None:
    model = model_of()
    stream, frame = FrameStream(model, 2), video(model, 1)[:, :, 0]
    for _ in range(4):
        stream(frame)
    with pytest.raises(ValueError, match=r"video's 4 tubelets.*pass their number as total.*reset\(\)"):
        stream(frame)
    stream.reset()
    stream(frame)
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        stream(frame)
