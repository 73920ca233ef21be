"""Vamba: a decoder layer, and models of two and three layers, of text that reads a video."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fused
import reference
from fused.modules import mamba2
from harness.baselines.vamba_upstream import UpstreamVamba
from harness.fixtures import functional_modules as modules
from harness.fixtures.chains import chain
from harness.instruments import short_training
from harness.judge.case import Case
from harness.judge.implementation import Implementation, fused_implementations
from harness.subjects.vamba.timing import bound as bound
from harness.subjects.vamba.timing import licence as licence
from harness.subjects.vamba.timing import races as races
from harness.subjects.vamba.training import VOCABULARY
from harness.subjects.vamba.training import learning_rate as learning_rate
from harness.subjects.vamba.training import special_cases as special_cases
from harness.subjects.vamba.training import training_losses as training_losses
from harness.subjects.vamba.training import training_target as training_target
from harness.subjects.vamba.training import training_title as training_title

KEY_BIAS = "cross_attn.k_proj.bias"


def cases(grid: str) -> list[Case]:
    """Return text of L tokens and a video of V in B rows: a layer, models, packed, padded, without a video, from a cache.

    Cases with `decode` are cut in the text, those with `stream` in the video.
    """

    def shape(B: int, L: int, V: int, D: int, H: int, G: int) -> dict[str, int]:
        return {"B": B, "L": L, "V": V, "D": D, "H": H, "G": G}

    tiny = [Case("vamba", tuple(shape(1, 2, 3, 12, 2, 1).items()), o, "float64") for o in (("layer",), ("layers=2",))]
    small = shape(2, 7, 11, 32, 4, 2)
    variants: list[tuple[str, ...]] = [
        ("layer",), ("layers=2",), ("layers=3", "packed"), ("layers=2", "padded"), ("layers=2", "text-only"),
        ("layers=2", "shared"), ("layers=2", "normed", "no-alpha"), ("layers=2", "rotated"),
        ("layers=3", "decode", "state"), ("layers=3", "stream", "state", "infer"),
    ]  # fmt: skip
    if grid == "smoke":
        return [*tiny, *modules.in_precisions([(small, v) for v in variants if v[-1] != "shared"], "vamba", half=False)]
    wide = shape(1, 33, 197, 256, 4, 2)
    wider = [(wide, v) for v in (variants[1], variants[2], variants[-2], variants[-1])]
    return [*tiny, *modules.in_precisions([*((small, v) for v in variants), *wider], "vamba", half=True)]


@functools.lru_cache(maxsize=1)
def implementations() -> list[Implementation]:
    """Return `Vamba` and its layer of the reference and of `fused`, by backend."""

    def call_with(backend: str) -> Callable[..., Any]:
        return lambda case: _make(fused, case, backend=backend)

    backends = fused_implementations(mamba2.BACKENDS, call_with, every_backend=True)
    kept = [i for i in backends if i.backend != "native_kept"]  # the same as native here
    rival = Upstream("upstream", make_upstream, True, "torch", mamba2.BACKENDS)  # what every backend of the mixer declares
    return [Implementation("reference", lambda case: _make(reference, case)), *kept, rival]


@dataclass(frozen=True)
class Upstream(Implementation):
    """The rival of the race, which is asked what licenses it, no more."""

    def missing(self, case: Case) -> str | None:
        asked = case.fits(L=7) and set(case.options) - {"cast", "autocast"} == {"layers=2"}
        return None if asked else "upstream is asked the licence's cases only"


def make_upstream(case: Case) -> nn.Module:
    """Return the model of a case as upstream runs it."""
    return UpstreamVamba(_make(fused, case).config)  # type: ignore[arg-type]


def _make(package: Any, case: Case, **options: Any) -> nn.Module:
    D, C = case["D"], case["D"] // case["H"]
    config = package.VambaConfig(
        vocab_size=VOCABULARY, hidden_size=D, intermediate_size=2 * D, num_hidden_layers=int(case.option("layers", "1")),
        num_attention_heads=case["H"], num_key_value_heads=case["G"],
        mrope_section=(C // 2 - 2 * (C // 6), C // 6, C // 6),
        use_alpha_balancing=not case.has("no-alpha"), cross_attn_use_layer_norm=case.has("normed"),
        cross_attn_use_position_embeddings=case.has("rotated"), mixer={"headdim": 8, "d_state": 16},
    )  # fmt: skip
    return package.VambaDecoderLayer(config, 0, **options) if case.has("layer") else package.Vamba(config, **options)


def build(call: Callable[..., Any], case: Case) -> nn.Module:
    """Return the module of a case; in a training the biases of the video's keys are fixed, see `without_key_slopes`."""
    module = call(case)
    if case.only_check == "convergence":
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(not name.endswith(KEY_BIAS))
    return module


def draw(case: Case, seed: int) -> dict[str, Tensor]:
    """Draw vision tokens, of a layer text too, and a trained model's parameters."""
    module = modules.on_meta(build, implementations()[0].call, case)
    leaves = modules.parameters(module, case, seed)
    leaves |= {k: (0.5 + 0.5 * v).clamp(0.05, 0.95) for k, v in leaves.items() if k.endswith("alpha")}
    if case.only_check == "convergence":
        return leaves | {"clip": short_training.clips(case)}
    if case.has("layer"):
        leaves["text"] = case.normal(seed, "text", case["B"], case["L"], case["D"])
    if not case.has("text-only"):
        leaves["video"] = case.normal(seed, "video", case["B"], case["V"], case["D"])
    return leaves


def precise(case: Case) -> set[str]:
    """Return those of `functional_modules.precise`."""
    return modules.precise(case, modules.on_meta(build, implementations()[0].call, case), {"text", "video"}, set())


def no_cotangent(case: Case) -> set[str]:
    """Return nothing: every output has a cotangent."""
    return set()


def output_values(case: Case) -> int:
    """Return 1: one output is a loss."""
    return 1 if not case.has("layer", "state") else case["B"] * case["L"] * case["D"]


def steps(case: Case) -> float:
    """Return the steps of the scans, and a share for the products."""
    return int(case.option("layers", "1")) * (case["V"] + case["L"]) * (1 + case["B"] * case["D"] ** 2 / 20000)


def num_units(case: Case) -> int:
    """Return the tokens of what is cut."""
    return case["V"] if case.has("stream") else case["L"]


def time_axes(case: Case) -> dict[str, int]:
    """Return the axis of tokens of what is cut, or of both streams of a layer."""
    if case.has("stream"):
        layers = range(int(case.option("layers", "1")))
        return {"video": 1} | {f"{name}_{i}": 2 for i in layers for name in ("keys", "values")}
    return {"logits": 1} if case.has("decode") else {"text": 1, "video": 1} if case.has("layer") else {}


def token_ids(case: Case, leaves: dict[str, Tensor]) -> Tensor:
    """Return the text (B, L), the same for all seeds; B is the video's where there is one."""
    rows = len(leaves["video"]) if "video" in leaves else case["B"]
    ids = torch.randint(0, VOCABULARY, (rows + 4, case["L"]), generator=case.generator(0, "ids"))
    return ids[:rows].to(next(iter(leaves.values())).device)


def arguments(case: Case, device: torch.device) -> dict[str, Any]:
    """Return positions, masks and lengths of a case, without those that are None."""
    B, L, V = case["B"], case["L"], case["V"]
    given: dict[str, Any] = {}
    if case.has("packed", "shared"):
        first = L // 2 + 1
        given["position_ids"] = torch.cat((torch.arange(first), torch.arange(L - first))).expand(3, B, -1)
        given["encoder_seq_lens"] = [[V - 2] if case.has("shared") else [3 + b, V - 4 - b] for b in range(B)]
    if case.has("padded"):
        given["encoder_seq_lens"] = torch.tensor([[V - 3 * b] for b in range(B)])
        given["attention_mask"] = torch.stack([torch.arange(L) >= 2 * b for b in range(B)]).long()
    if case.has("rotated"):
        given["encoder_position_ids"] = torch.stack([torch.arange(V) // d for d in (6, 3, 1)])[:, None].expand(-1, B, -1)
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items()}


def evaluate(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return both streams of a layer; of a model logits, 0 at padding, the loss, and with `stream` keys and values."""
    module, leaves = modules.on_meta(build, call, case), without_key_slopes(case, leaves)
    if case.has("layer"):
        with modules.precision(case, leaves):
            text, video = modules.call(module, leaves, lambda m, t, v: m(t, v), leaves["text"], leaves["video"])
        return {"text_out": text, "video_out": video}
    ids, given = token_ids(case, leaves), arguments(case, next(iter(leaves.values())).device)
    labels = None if case.has("state") else ids.masked_fill(given.get("attention_mask", torch.ones_like(ids)) == 0, -100)
    with modules.precision(case, leaves):
        out = modules.call(
            module, leaves,
            lambda m, i, v, y: m(i, video=v, labels=y, use_cache=case.has("stream"), **given), ids, leaves.get("video"), labels,
        )  # fmt: skip
    if case.has("stream"):
        return {"logits": out.logits} | pairs(out.cache)
    if case.has("decode"):
        return {"logits": out.logits}
    kept = given.get("attention_mask", torch.ones_like(ids)).bool()
    return {"logits": torch.where(kept[..., None], out.logits, 0), "loss": out.loss[None]}


def pairs(cache: Any) -> dict[str, Tensor]:
    """Return the video's keys and values of every layer by name."""
    found: dict[str, Tensor] = {}
    for name in ("keys", "values"):
        found |= {f"{name}_{i}": t for i, t in enumerate(getattr(cache, "video_" + name))}
    return found


def without_key_slopes(case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the leaves, with the biases of the video's keys as constants unless keys are rotated.

    Such a bias changes all scores of a query alike, which softmax does not see: its slope is 0 and a rounding is found.
    """
    if case.has("rotated"):
        return leaves
    return leaves | {k: v.detach() for k, v in leaves.items() if k.endswith(KEY_BIAS)}


def chunked(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor], cuts: tuple[int, ...]) -> dict[str, Tensor]:
    """Return the outputs of a text that goes on from caches, or of a video that is streamed, another one after it."""
    module, leaves = modules.on_meta(build, call, case), without_key_slopes(case, leaves)
    ids = token_ids(case, leaves)
    if case.has("stream"):
        return _streamed(module, case, leaves, ids, cuts)

    def step(start: int, stop: int, cache: Any) -> Any:
        with modules.precision(case, leaves):
            video = leaves["video"] if cache is None else None
            out = modules.call(
                module, leaves, lambda m, v: m(ids[:, start:stop], video=v, cache=cache, use_cache=True), video
            )  # fmt: skip
        return out.logits, out.cache

    outputs, _ = chain(step, cuts, case["L"], None)
    return {"logits": torch.cat(outputs, dim=1)}


def _streamed(
    module: nn.Module, case: Case, leaves: dict[str, Tensor], ids: Tensor, cuts: tuple[int, ...]
) -> dict[str, Tensor]:
    """Return logits, keys and values by `encode_video`; the reference, which has none, gets the whole video."""

    def run(m: Any, video: Tensor) -> Any:
        if not hasattr(m, "encode_video"):
            out = m(ids, video=video, use_cache=True)
            return {"logits": out.logits} | pairs(out.cache)
        edges = [*cuts, case["V"]]
        parts = [video[:, start:stop] for start, stop in zip(edges[:-1], edges[1:], strict=True)]
        m.encode_video(-video)
        cache = m.encode_video(iter(parts), chunk=max(2, case["V"] // len(parts)))
        return {"logits": m(ids, cache=cache).logits} | pairs(cache)

    with modules.precision(case, leaves):
        return modules.call(module, leaves, run, leaves["video"])


def costly_checks(case: Case) -> set[str]:
    """Return `writes` for the packed model, and `device` at one size.

    Not `compile`: a forward with labels looks at them on the host, so no graph holds it; that of a decoded token is asked by
    the tests of `generate`.
    """
    if case.has("packed"):
        return {"writes"}
    return {"device"} if case.options == ("layers=2",) else set()
