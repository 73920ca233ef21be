"""Vamba on anything: sizes, options and rows drawn by hypothesis, and arguments that do not fit.

In float64 logits, loss and gradients are those of the reference, and a text that goes on from a cache has those of the whole.
"""

from typing import Any, NamedTuple

import pytest
import torch
from fuzzing import HOSTILE, SEEDS, examples, near
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fused
import reference

WIDTH, WORDS = 8, 11
ARGUMENTS = (
    "input_ids", "inputs_embeds", "video", "attention_mask", "position_ids", "cross_attention_mask", "encoder_position_ids",
    "encoder_seq_lens", "labels", "cache",
)  # fmt: skip


pytestmark = pytest.mark.usefixtures("unchecked")  # own checks are asked, not those of signatures


class Drawn(NamedTuple):
    """A model of the reference, the same of `fused`, in float64, their arguments, and which tokens are no padding."""

    truth: Any
    found: Any
    given: dict[str, Any]
    kept: Tensor


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, Any]:
    heads, key_heads = draw(st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2)]))
    mixer = {"headdim": draw(st.sampled_from([2, 4])), "d_state": draw(st.integers(1, 5)), "d_conv": draw(st.integers(2, 4))}
    mixer |= {"ngroups": draw(st.sampled_from([1, 2])), "expand": draw(st.sampled_from([1, 2]))}
    mixer |= {"norm_before_gate": draw(st.booleans()), "D_has_hdim": draw(st.booleans())}
    return {
        "vocab_size": WORDS, "hidden_size": WIDTH, "intermediate_size": 6, "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads, "num_key_value_heads": key_heads, "head_dim": 6, "mrope_section": (1, 1, 1),
        "use_alpha_balancing": draw(st.booleans()), "cross_attn_use_layer_norm": draw(st.booleans()), "mixer": mixer,
    }  # fmt: skip


@st.composite
def padded_rows(draw: st.DrawFn) -> tuple[dict[str, Any], Tensor]:
    """Draw rows of one sample each: texts padded on either side, videos on the right, some or all without a video."""
    counts = draw(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 6)), min_size=1, max_size=3))
    longest, left = max(n for n, _ in counts), draw(st.booleans())
    kept = torch.tensor([[(i >= longest - n) if left else (i < n) for i in range(longest)] for n, _ in counts])
    options: dict[str, Any] = {} if bool(kept.all()) and draw(st.booleans()) else {"attention_mask": kept.long()}
    tokens = max(n for _, n in counts) + draw(st.integers(0, 2))
    if draw(st.booleans()) or any(n for _, n in counts):
        options |= {"video": torch.randn(len(counts), tokens, WIDTH).double()}
        options |= {"encoder_seq_lens": torch.tensor([[n] for _, n in counts])}
    return options | {"input_ids": torch.randint(WORDS, kept.shape)}, kept


@st.composite
def packed_rows(draw: st.DrawFn) -> tuple[dict[str, Any], Tensor]:
    """Draw a row of several samples, each with its own video or none, or with one video for all; padding may follow."""
    counts = draw(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5)), min_size=2, max_size=4))
    at = torch.cat([torch.arange(n) for n, _ in counts]).expand(3, 1, -1)
    lengths = [n for _, n in counts] if draw(st.booleans()) else [draw(st.integers(0, 6))]
    video = torch.randn(1, sum(lengths) + draw(st.integers(0, 2)), WIDTH).double()
    ids = torch.randint(WORDS, (1, at.shape[2]))
    given = {"input_ids": ids, "position_ids": at, "video": video, "encoder_seq_lens": [lengths]}
    return given, torch.ones_like(ids, dtype=torch.bool)


@st.composite
def models(draw: st.DrawFn, rows: Any) -> Drawn:
    torch.manual_seed(draw(SEEDS))
    drawn = draw(sizes())
    truth = reference.Vamba(reference.VambaConfig(**drawn)).double()
    found = fused.Vamba(fused.VambaConfig(**drawn), backend="torch").double()
    found.recompute_layers = draw(st.booleans())
    with torch.no_grad():
        for p in truth.parameters():
            p.add_(0.3 * torch.randn_like(p))
    found.load_state_dict(truth.state_dict())
    given, kept = draw(rows)
    labels = torch.where(kept & (torch.rand(kept.shape) < 0.7), given["input_ids"], -100)
    return Drawn(truth, found, given | {"labels": labels}, kept)


def differentiated(model: Any, given: dict[str, Any], kept: Tensor) -> dict[str, Tensor]:
    """Return the logits that are no padding, the loss, and the gradients of both in the video and all parameters."""
    leaves = {name: x.clone().requires_grad_() for name, x in given.items() if name == "video"}
    out = model(**given | leaves)
    named = dict(model.named_parameters()) | leaves
    logits = out.logits[kept]
    loss = out.loss if bool((given["labels"][:, 1:] != -100).any()) else logits.sum() * 0
    weights = 1 + torch.arange(logits.numel(), dtype=torch.float64).view(logits.shape) % 7
    grads = torch.autograd.grad((logits * weights).sum() + 3 * loss, list(named.values()), allow_unused=True)
    found = {"logits": logits.detach(), "loss": loss.detach()}
    return found | {n: torch.zeros(0).double() if g is None else g for n, g in zip(named, grads, strict=True)}


@pytest.mark.parametrize("rows", [padded_rows(), packed_rows()], ids=["padded", "packed"])
def test_results_and_gradients_are_the_references(rows: Any) -> None:
    @examples(0.4)
    @given(models(rows))
    def check(drawn: Drawn) -> None:
        truth, found, given, kept = drawn
        due, got = (differentiated(model, given, kept) for model in (truth, found))
        for name, x in due.items():
            if got[name].numel() != x.numel():  # a parameter without effect, whose gradient is 0 or none
                assert not got[name].any() and not x.any(), name
            elif bool(x.abs().max() > 1e-12) if x.numel() else False:
                near(name, got[name], x)

    check()


@examples(0.4)
@given(models(padded_rows()), st.data())
def test_a_text_that_goes_on_has_what_the_whole_has(drawn: Drawn, data: st.DataObject) -> None:
    """From a video that was read chunk by chunk and a cache, in parts of any length."""
    _, model, given, kept = drawn
    ids = given["input_ids"]
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, ids.shape[1] - 1)), max_size=2)))
    parts = [part for part in ids.tensor_split(cuts, dim=1) if part.shape[1]]
    with torch.no_grad():
        whole = model(**{name: x for name, x in given.items() if name != "labels"}).logits
        cache, logits, done = None, [], 0
        if "video" in given:
            lengths = given["encoder_seq_lens"][:, 0].tolist()
            cache = model.encode_video(given["video"], chunk=data.draw(st.integers(1, 7)), lengths=lengths)
        for part in parts:
            done += part.shape[1]
            mask = {"attention_mask": given["attention_mask"][:, :done]} if "attention_mask" in given else {}
            out = model(part, cache=cache, use_cache=True, **mask)
            logits.append(out.logits)
            cache = out.cache
    near("logits", torch.cat(logits, dim=1)[kept], whole[kept])


@examples()
@given(st.sampled_from(ARGUMENTS), st.sampled_from(HOSTILE))
def test_what_does_not_fit_is_refused_with_its_name(name: str, value: Any) -> None:
    if value is None:
        return
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6, "mrope_section": (1, 1, 1)}
    plain = {"vocab_size": WORDS, "hidden_size": WIDTH, "intermediate_size": 6, "num_hidden_layers": 1}
    model = fused.Vamba(fused.VambaConfig(**plain, **heads, mixer={"headdim": 4, "d_state": 2}))
    given: dict[str, Any] = {"video": torch.randn(2, 3, WIDTH), "input_ids": torch.ones(2, 4, dtype=torch.long)}
    if name == "inputs_embeds":
        del given["input_ids"]
    if name == "cache":
        del given["video"]
    with pytest.raises((TypeError, ValueError), match=name):
        model(**given | {name: value})
