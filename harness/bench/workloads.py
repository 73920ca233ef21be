"""What a worker times: operators as the judge calls them, models as a user does."""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import fused
from harness.baselines.vit import ViT, ViTConfig
from harness.bench.clock import Call
from harness.fixtures import functional_modules as modules
from harness.judge.case import Case
from harness.judge.registry import subjects
from harness.records.speed import Entry, Point
from reference.ops.dtypes import accumulation_dtype

COLD = 160 * 2**20  # bytes of rotated inputs: three times an H200's L2 cache
ROTATIONS = 16
_OPTIONS = {"norm": ("kind=rms",), "mixer": ("cast",)}
# mamba-ssm's own layout, so that it is not timed with a transposition which its models do not make
_CHANNELS_FIRST = {("scan", "fused:mamba_ssm"), ("scan_both", "fused:mamba_ssm")}
Network = ViT | fused.VideoMamba


@dataclass(frozen=True)
class OnDevice(Case):
    """A case whose numbers are drawn where they are used: a long one has gigabytes of them."""

    device: str = "cpu"

    def generator(self, seed: int, what: str) -> torch.Generator:
        """As `Case.generator`, on the device."""
        return torch.Generator(self.device).manual_seed(super().generator(seed, what).initial_seed())

    def normal(self, seed: int, what: str, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(*shape, generator=self.generator(seed, what), device=self.device)

    def log_uniform(self, seed: int, what: str, low: float, high: float, *shape: int) -> Tensor:
        """Numbers between low and high, uniform in their logarithm."""
        u = torch.rand(*shape, generator=self.generator(seed, what), device=self.device)
        return torch.exp(u * math.log(high / low) + math.log(low))


def make(point: Point, entry: Entry, device: str) -> Call:
    """The call of an entry at a point."""
    built = model(point, entry, device) if entry.variant else operator(point, entry, device)
    return graphed(built) if point.way == "graph" else built


def operator(point: Point, entry: Entry, device: str) -> Call:
    """An operator on inputs that are not in the cache: every call takes another set of them."""
    subject = subjects()[entry.subject]
    case = OnDevice(entry.subject, point.dims, _OPTIONS.get(point.race, ()), point.dtype, device=device)
    implementation = next(i for i in subject.implementations() if i.name == entry.implementation)
    low, precise = case.torch_dtype, subject.precise(case)
    wide = accumulation_dtype(low)
    sets: list[dict[str, Tensor]] = []
    while len(sets) < ROTATIONS and sum(t.nbytes for leaves in sets for t in leaves.values()) < COLD:
        with torch.device(device):
            drawn = subject.draw(case, len(sets))
        drawn = {k: v.to(wide if k in precise else low) for k, v in drawn.items()}
        if (entry.subject, entry.implementation) in _CHANNELS_FIRST:
            drawn = {k: v.transpose(1, 2).contiguous().transpose(1, 2) if v.dim() == 3 else v for k, v in drawn.items()}
        sets.append({k: v.requires_grad_(point.mode == "train") for k, v in drawn.items()})
    cotangents: dict[str, Tensor] = {}
    turn = 0

    def run() -> object:
        nonlocal turn
        leaves, turn = sets[turn % len(sets)], turn + 1
        with torch.set_grad_enabled(point.mode == "train"):
            results = subject.evaluate(implementation.call, case, leaves)
        if point.mode == "infer":
            return results
        heard = {k: v for k, v in results.items() if k not in subject.silent(case)}
        for name, value in heard.items():
            if name not in cotangents:
                cotangents[name] = torch.randn_like(value)
        return torch.autograd.grad(list(heard.values()), list(leaves.values()), list(cotangents.values()), allow_unused=True)

    return Call(run, queued=True)


def drawn(build: Callable[[Point, Entry], Network], point: Point, entry: Entry, device: str) -> Any:
    """A network with parameters in the point's dtype, in a trained model's range, and drawn where they are used: initial
    values take seconds."""
    dtype = getattr(torch, point.dtype)
    with torch.device("meta"):
        network = build(point, entry)
    case = OnDevice(entry.subject, point.dims, (), point.dtype, device=device)
    with torch.device(device):
        values = modules.parameters(network, case, seed=0)
        network.load_state_dict({name: value.to(dtype) for name, value in values.items()}, assign=True)
    return network


def model(point: Point, entry: Entry, device: str) -> Call:
    """A classifier in the point's dtype, parameters too, on clips of random pixels, or its blocks on random tokens."""
    dtype = getattr(torch, point.dtype)
    network = drawn(networks()[entry.subject], point, entry, device)
    with torch.device(device):
        inputs, labels = _inputs(point, network.config.embed_dim, dtype), torch.arange(point["B"]) % 10
    head = network if point.clips else _blocks(network)
    forward = torch.compile(head, dynamic=False) if point.way == "compiled" else head
    if point.way == "chunked":
        forward = functools.partial(network.forward_chunked, chunk_frames=point["F"])
    if point.mode == "infer":
        network.eval()
        return Call(torch.no_grad()(lambda: forward(inputs)))

    def forget() -> None:
        network.zero_grad(set_to_none=True)

    def step() -> None:
        out = forward(inputs).float()
        (nn.functional.cross_entropy(out, labels) if point.clips else out.square().mean()).backward()

    return Call(step, forget)


def _inputs(point: Point, width: int, dtype: torch.dtype) -> Tensor:
    shape = (3, point["T"], point["S"], point["S"]) if point.clips else (point["L"], width)
    return torch.randn(point["B"], *shape, dtype=dtype)


def _blocks(network: Network) -> Callable[[Tensor], Tensor]:
    """A model's blocks and final norm over all tokens."""
    if isinstance(network, ViT):
        return lambda tokens: network.norm(network.encode(tokens))
    return lambda tokens: network.encode(tokens)[0]


def networks() -> dict[str, Callable[[Point, Entry], Network]]:
    """Models by subject, of the entry's size, for the point's clips."""

    def videomamba(point: Point, entry: Entry) -> Network:
        config = getattr(fused.VideoMambaConfig, entry.variant)(**_clips(point), drop_path_rate=0.0)
        if point.way == "checkpointed":
            config = replace(config, use_checkpoint=True, checkpoint_num=config.depth)
        return fused.VideoMamba(config, backend=entry.implementation.removeprefix("fused:"))

    def vit(point: Point, entry: Entry) -> Network:
        return ViT(
            getattr(ViTConfig, entry.variant)(
                **_clips(point), attention="naive" if entry.implementation == "reference" else entry.implementation
            )
        )

    return {"videomamba": videomamba, "vit": vit}


def _clips(point: Point) -> dict[str, int]:
    clip = {"img_size": point["S"], "num_frames": point["T"]} if point.clips else {}
    return clip | {"num_classes": 10}


def graphed(call: Call) -> Call:
    """The same call replayed from a CUDA graph; gradients are made anew inside of it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    begin = time.perf_counter()
    with torch.cuda.stream(stream):
        for _ in range(3):
            if call.before:
                call.before()
            call.run()
            stream.synchronize()
            if time.perf_counter() - begin > 1:  # the first compiles and fills caches
                break
    torch.cuda.current_stream().wait_stream(stream)
    if call.before:
        call.before()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.run()
    peak = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()  # a replay allocates nothing
    return replace(call, run=graph.replay, before=None, queued=False, peak=peak)
