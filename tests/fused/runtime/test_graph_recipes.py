"""The user guide's ways to train with CUDA graphs in a loop of one's own: PyTorch's graphed callables, and its compiler."""

import copy

import pytest
import torch
import torch.nn.functional as F
from rule import assert_rule
from torch import Tensor

from fused import VideoMamba, VideoMambaConfig
from fused.train import parameter_groups

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CONFIG = {"img_size": 32, "num_frames": 2, "depth": 2, "embed_dim": 64, "num_classes": 5}


def make(**fields: float) -> tuple[VideoMamba, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = VideoMamba(VideoMambaConfig(**CONFIG, **fields)).cuda().train()
    torch.nn.init.normal_(model.head.weight)
    return model, torch.optim.AdamW(parameter_groups(model, lr=1e-2, weight_decay=0.05), fused=True)


def batch(step: int) -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(step)
    clips = torch.randn(4, 3, 2, 32, 32, generator=drawn)
    return clips.cuda(), torch.randint(5, (4,), generator=drawn).cuda()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_graphed_callables(accumulate: int, dtype: torch.dtype | None) -> None:
    """Weights have the bits of an eager loop after every step, with drop path and clipped gradients."""
    weights = []
    for graphs in (False, True):
        model, optimizer = make(drop_path_rate=0.4)
        if graphs:
            with torch.autocast("cuda", dtype, enabled=dtype is not None, cache_enabled=False):
                torch.cuda.make_graphed_callables(model, (torch.zeros_like(batch(0)[0]),))
        for p in model.parameters():
            p.grad = torch.zeros_like(p)  # a graph's own gradients must not become those that are added up
        found = []
        for step in range(4):
            for i in range(accumulate):
                clips, labels = batch(2 * step + i)
                torch.manual_seed(2 * step + i)
                with torch.autocast("cuda", dtype, enabled=dtype is not None, cache_enabled=False):
                    loss = F.cross_entropy(model(clips).float(), labels)
                (loss / accumulate).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            found.append((loss.item(), {name: p.detach().clone() for name, p in model.named_parameters()}))
        weights.append(found)
    for (loss, ours), (wanted, theirs) in zip(*weights[::-1], strict=True):
        assert loss == wanted and not [name for name in theirs if not torch.equal(ours[name], theirs[name])]


def test_compiled_with_reduce_overhead() -> None:
    """In a process without the tests' check of signatures, which cannot be compiled."""
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(train_compiled)


def train_compiled() -> None:
    """Loss and gradients keep to the rule at every step of a training, so the graphs see new data and new weights."""
    model, optimizer = make(drop_path_rate=0.0)
    fast = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    exact, plain = (VideoMamba(model.config, backend="torch").cuda().train() for _ in range(2))
    exact.double()
    for step in range(5):
        clips, labels = batch(step)
        for other in (exact, plain):
            other.load_state_dict(model.state_dict())
        results = []
        for network, x in ((fast, clips), (exact, clips.double()), (plain, clips)):
            torch.compiler.cudagraph_mark_step_begin()
            loss = F.cross_entropy(network(x), labels)
            loss.backward()
            owner = model if network is fast else network
            named = {name: p.grad for name, p in owner.named_parameters()}
            results.append({"loss": loss.detach()} | {name: g.clone() for name, g in named.items() if g is not None})
            if owner is not model:
                owner.zero_grad()
        got, truth, rounded = results
        assert_rule([(got, {name: x.double() for name, x in truth.items()}, rounded)])
        optimizer.step()
        optimizer.zero_grad()


def test_a_graphed_model_evaluates_as_before() -> None:
    """`make_graphed_callables` leaves the eval mode of the module alone, and other shapes in it."""
    model, _ = make()
    plain = copy.deepcopy(model)
    torch.cuda.make_graphed_callables(model, (batch(0)[0],))
    with torch.no_grad():
        assert torch.equal(model.eval()(batch(1)[0][:2]), plain.eval()(batch(1)[0][:2]))
