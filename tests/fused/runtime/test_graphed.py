"""`fused.graphed` returns what the model returns, after whatever happened to the model or to its output."""

import threading
from typing import Any

import pytest
import torch
from tape import TapeRecorder
from torch import Tensor, nn

from fused import VideoMamba, VideoMambaConfig, VideoMambaEncoder, backends, graphed
from fused.runtime.graphed import Graphed

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SIZES = {"img_size": 32, "num_frames": 2, "depth": 2, "embed_dim": 32}


class Recorders:
    """Recorders of tapes, and how often something was recorded."""

    def __init__(self) -> None:
        self.made: list[TapeRecorder] = []

    def __call__(self, device: torch.device) -> TapeRecorder:
        self.made.append(TapeRecorder())
        return self.made[-1]

    @property
    def count(self) -> int:
        return sum(len(recorder.tapes) for recorder in self.made)


def make(model: nn.Module, max_graphs: int = 8) -> tuple[Any, Recorders]:
    """Return the graphed model, by tapes on a CPU, and the recorders of the tapes."""
    recorders = Recorders()
    return (graphed(model, max_graphs) if CUDA else Graphed(model, max_graphs, recorders)), recorders


def classifier(**fields: Any) -> VideoMamba:
    torch.manual_seed(0)
    return VideoMamba(VideoMambaConfig(**SIZES | {"num_classes": 3, **fields})).to(DEVICE).eval()


def clips(count: int = 2, seed: int = 0, **options: Any) -> Tensor:
    return torch.randn(count, 3, 2, 32, 32, generator=torch.Generator().manual_seed(seed)).to(DEVICE, **options)


def assert_right(fast: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Assert that two calls, the first of which may record, return what the model returns."""
    with torch.no_grad():  # the model itself takes inputs on its own device only
        on_device = [x.to(DEVICE) for x in args], {name: x.to(DEVICE) for name, x in kwargs.items()}
        wanted = model(*on_device[0], **on_device[1])
    for _ in range(2):
        got = fast(*args, **kwargs)
        assert type(got) is type(wanted)
        pairs = zip(got, wanted, strict=True) if isinstance(got, tuple) else [(got, wanted)]
        for ours, theirs in pairs:
            assert ours is theirs is None or torch.equal(ours, theirs) and not ours.requires_grad
    return got


def test_shapes_and_fresh_data() -> None:
    model = classifier()
    fast, recorders = make(model)
    kept = assert_right(fast, model, clips())
    value = kept.clone()
    for seed in range(3):
        for count in (1, 2):
            assert_right(fast, model, clips(count, seed))
    assert torch.equal(kept, value)  # it is the caller's
    assert CUDA or recorders.count == 2
    assert_right(fast, model, clip=clips(2, 5).cpu())  # on another device, by name
    with torch.inference_mode():
        got = fast(clips())
    assert torch.equal(got, value) and not got.is_inference()


def test_other_dtypes_and_modes() -> None:
    """Each autocast, dtype of input, and mode of the kernels has a graph."""
    model = classifier()
    fast, recorders = make(model)
    outputs = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            outputs.append(assert_right(fast, model, clips()))
    assert {x.dtype for x in outputs} == {torch.float32, torch.bfloat16, torch.float16}
    with backends.batch_invariant():
        assert_right(fast, model, clips())
    if CUDA:
        return  # the native backend takes no float64
    model.double()
    assert assert_right(fast, model, clips(dtype=torch.float64)).dtype == torch.float64
    assert recorders.count == 5


def load(model: VideoMamba) -> None:
    model.load_state_dict(classifier_of(1).state_dict())


def assign(model: VideoMamba) -> None:
    model.load_state_dict(classifier_of(2).state_dict(), assign=True)


def write(model: VideoMamba) -> None:
    with torch.no_grad():
        model.layers[1].mixer.out_proj.weight.mul_(0.5)


def step(model: VideoMamba) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()


def replace(model: VideoMamba) -> None:
    model.layers[0].mixer.D = nn.Parameter(torch.zeros_like(model.layers[0].mixer.D))


def set_data(model: VideoMamba) -> None:
    model.norm_f.weight.data = torch.full_like(model.norm_f.weight, 2.0)


def move(model: VideoMamba) -> None:
    model.to("cpu").to(DEVICE)
    model.head.bias.data = model.head.bias.data + 1


def new_head(model: VideoMamba) -> None:
    model.reset_classifier(5)
    model.to(DEVICE)


def hook(model: VideoMamba) -> None:
    model.head.register_forward_hook(lambda module, args, output: output + 1)


def adapter(model: VideoMamba) -> None:
    model.head = nn.Sequential(model.head, nn.Linear(3, 4, device=DEVICE)).eval()


def classifier_of(seed: int) -> VideoMamba:
    torch.manual_seed(seed)
    model = VideoMamba(VideoMambaConfig(**SIZES, num_classes=3)).to(DEVICE)
    nn.init.normal_(model.head.weight)
    return model


@pytest.mark.parametrize("change", [load, assign, write, step, replace, set_data, move, new_head, hook, adapter])
def test_after_a_change_of_the_model(change: Any) -> None:
    """Nothing stale is replayed, at any of the shapes that were recorded before."""
    model = classifier()
    fast, _ = make(model)
    before = [assert_right(fast, model, clips(count)) for count in (1, 2)]
    change(model)
    after = [assert_right(fast, model, clips(count)) for count in (2, 1)][::-1]
    assert not any(old.shape == new.shape and torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_the_number_of_graphs_has_a_bound() -> None:
    """Of three shapes two are kept, those that were used last."""
    model = classifier()
    fast, recorders = make(model, max_graphs=2)
    for count, recorded in zip((1, 2, 1, 3, 1, 2), (1, 2, 2, 3, 3, 4), strict=True):
        assert_right(fast, model, clips(count))
        assert CUDA or recorders.count == recorded
    assert len(fast._graphs) == 2
    assert fast.memory_bytes >= clips(3).nbytes and "Graphed(VideoMamba, 2 graphs, " in repr(fast)
    fast.clear()
    assert fast.memory_bytes == 0
    assert_right(fast, model, clips(1))


class Returns(nn.Module):
    """A model with a tensor by keyword, and nested output."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, offset: Tensor | None = None) -> dict[str, Any]:
        y = x * self.scale
        return {"sums": [y.sum(), None], "y": y if offset is None else y + offset}


class Reads(nn.Linear):
    """A model that reads the values of an argument on the host."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x if mask is None or float(mask.sum()) > 0 else -x)


class Packs(nn.Linear):
    """A model that keeps what it has made of its weight until that is written to."""

    packed: tuple[int, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is None or self.packed[0] != self.weight._version:
            self.packed = self.weight._version, 2 * self.weight.detach()
        return x @ self.packed[1].t()


def test_what_a_model_has_made_of_a_weight_is_made_again_when_that_is_written_to() -> None:
    model = Packs(3, 4).to(DEVICE).eval()
    fast, _ = make(model)
    x = torch.randn(2, 3, device=DEVICE)
    assert_right(fast, model, x)
    with torch.no_grad():
        model.weight.mul_(0.5)
    assert torch.equal(fast(x), x @ (2 * model.weight.detach()).t())


def test_keywords_and_nested_output() -> None:
    model = Returns().to(DEVICE).eval()
    fast, recorders = make(model)
    x, offset = torch.randn(2, 2, 3, device=DEVICE)
    for _ in range(2):
        assert torch.equal(fast(x)["y"], x) and torch.equal(fast(x, offset=offset)["y"], x + offset)
        assert torch.equal(fast(x, offset)["y"], x + offset) and torch.equal(fast(x, None)["y"], x)
        assert fast(x)["sums"][1] is None and torch.equal(fast(2 * x)["sums"][0], (2 * x).sum())
        assert fast(x.double())["y"].dtype == torch.float64


@pytest.mark.usefixtures("unchecked")
def test_encoder_and_distilled_classifier() -> None:
    torch.manual_seed(0)
    encoder = VideoMambaEncoder(VideoMambaConfig(**SIZES, clip_output_dim=8, clip_return_layer=0)).to(DEVICE).eval()
    fast, _ = make(encoder)
    assert_right(fast, encoder, clips())
    visible = torch.tensor([[0, 2, 3, 7], [0, 1, 5, 8]], device=DEVICE)
    got = assert_right(fast, encoder, clips(), visible=visible)
    mask = torch.ones(2, 9, dtype=torch.bool).scatter(1, visible.cpu(), False)
    assert torch.equal(got.tokens, encoder(clips(), mask).tokens)
    with pytest.raises(ValueError, match="mask and visible are given; allowed: one of them"):
        encoder(clips(), mask, visible=visible)
    with pytest.raises(ValueError, match=r"visible is torch.int64 \(1, 4\); allowed is int64 \(2, V\) with V from 1 to 9"):
        encoder(clips(), visible=visible[:1])
    model = classifier(distill_dim=8)
    fast, _ = make(model)
    assert_right(fast, model, clips())


def test_calls_from_threads() -> None:
    model = classifier()
    fast, _ = make(model)
    inputs = [clips(1 + i % 2, i) for i in range(8)]
    with torch.no_grad():
        wanted = [model(x) for x in inputs]
    wrong: list[int] = []

    def run(i: int) -> None:
        if CUDA:
            with torch.cuda.stream(torch.cuda.Stream()):
                torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
                got = [fast(inputs[i]) for _ in range(4)]
                torch.cuda.current_stream().synchronize()
        else:
            got = [fast(inputs[i]) for _ in range(4)]
        if not all(torch.equal(x, wanted[i]) for x in got):
            wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.usefixtures("unchecked")
def test_errors() -> None:
    model = classifier()
    with pytest.raises(ValueError, match="graphed: model is on cpu; allowed: one CUDA device"):
        graphed(classifier().cpu())
    with pytest.raises(ValueError, match="model is on meta"):
        graphed(classifier().to("meta"))
    with pytest.raises(ValueError, match="no device, for want of parameters"):
        graphed(nn.Identity())
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got function"):
        graphed(clips)  # type: ignore[arg-type]
    with pytest.raises((TypeError, ValueError), match="max_graphs must be .*got 0"):
        graphed(model, 0)
    fast, _ = make(model)
    with pytest.raises(TypeError, match="graphed: clip is 3; allowed: tensors and None"):
        fast(3)
    with pytest.raises(TypeError, match="graphed: temporal_pos_total is 2; allowed"):
        fast(clips(), temporal_pos_total=2)
    with pytest.raises(ValueError, match="graphed: clip requires a gradient; .*make_graphed_callables"):
        fast(clips().requires_grad_())
    with pytest.raises(ValueError, match="clip has shape"):  # the model's own
        fast(clips()[:, :2])
    model.train()
    with pytest.raises(ValueError, match="model is in training mode"):
        fast(clips())
    model.eval()
    assert_right(fast, model, clips())
    reads = Reads(3, 3).to(DEVICE).eval()
    fast, _ = make(reads)
    x = torch.ones(2, 3, device=DEVICE)
    with pytest.raises(RuntimeError, match="the forward of Reads cannot be recorded for these arguments: .*captur"):
        fast(x, x)
    assert_right(fast, reads, x)
