"""A video that is read once: streaming prefill, questions on its cache, generation."""

import pytest
import torch

from fused import Vamba, VambaConfig
from fused.models.vamba import generate as generation

SIZES = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "mrope_section": (1, 1, 1), "mixer": {"headdim": 8, "d_state": 4},
}  # fmt: skip


def model(**options):
    torch.manual_seed(0)
    net = Vamba(VambaConfig(**SIZES | options)).double().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return net


def video(tokens, rows=1, seed=0):
    return torch.randn(rows, tokens, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ids(rows, length, seed=1):
    return torch.randint(0, 31, (rows, length), generator=torch.Generator().manual_seed(seed))


def assert_same_cache(got, due):
    for name in ("video_keys", "video_values"):
        for a, b in zip(getattr(got, name), getattr(due, name), strict=True):
            assert a.is_contiguous()
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("chunk", [1, 2, 5, 13, 14, 50])
@pytest.mark.parametrize("normed", [False, True])
def test_streaming_equals_the_whole(chunk, normed):
    net, clip = model(cross_attn_use_layer_norm=normed), video(13, 2)
    whole = net(ids(2, 4), video=clip, use_cache=True)
    streamed = net.encode_video(clip, chunk=chunk)
    assert_same_cache(streamed, whole.cache)
    torch.testing.assert_close(net(ids(2, 4), cache=streamed).logits, whole.logits)


@pytest.mark.parametrize("sizes", [(13,), (1,) * 13, (3, 0, 7, 2, 1), (12, 1)], ids=str)
def test_parts_of_any_size_give_the_same(sizes):
    net, clip = model(), video(13)
    got = net.encode_video((part for part in clip.split(sizes, 1)), chunk=4)
    assert_same_cache(got, net.encode_video(clip))


def test_memory_is_that_of_one_chunk():
    """No tensor of a streamed video has more tokens than a chunk, but for the result."""
    net, clip = model(), video(64)
    seen = []
    for layer in net.model.layers:
        layer.vision_mixer.register_forward_pre_hook(lambda m, given: seen.append(given[0].shape[1]))
    net.encode_video(clip, chunk=10)
    assert set(seen) == {10, 4} and len(seen) == 2 * 7  # two mixers have an effect


def test_rotated_keys_get_the_positions_of_their_chunk():
    net, clip = model(cross_attn_use_position_embeddings=True), video(13)
    grid = torch.stack([torch.arange(13) // d for d in (6, 3, 1)])[:, None]
    due = net(ids(1, 4), video=clip, encoder_position_ids=grid, use_cache=True).cache
    assert_same_cache(net.encode_video(clip, chunk=5, encoder_position_ids=grid), due)
    with pytest.raises(ValueError, match="encoder_position_ids"):
        net.encode_video(clip)
    with pytest.raises(ValueError, match="encoder_position_ids has 14"):
        net.encode_video(clip, encoder_position_ids=torch.zeros(3, 1, 14, dtype=torch.long))


def test_lengths_leave_padding_out():
    net, clip = model(), video(9, 2)
    padded = net.encode_video(clip, lengths=[9, 5])
    logits = net(ids(2, 4), cache=padded).logits
    alone = net(ids(2, 4)[1:], cache=net.encode_video(clip[1:, :5])).logits
    torch.testing.assert_close(logits[1:], alone)


def test_many_questions_about_one_video_leave_its_padding_out():
    net, clip, questions = model(), video(9), ids(3, 4)
    logits = net(questions, cache=net.encode_video(clip, lengths=[5])).logits
    torch.testing.assert_close(logits, torch.cat([net(q[None], video=clip[:, :5]).logits for q in questions]))


def test_nothing_runs_that_has_no_effect():
    """The last mixer, and what would come behind the last token."""
    net, heads = model(), []
    net.model.layers[-1].vision_mixer.register_forward_pre_hook(lambda *_: pytest.fail("the last mixer runs"))
    net.lm_head.register_forward_pre_hook(lambda *_: heads.append(1))
    net(ids(1, 4), video=video(9))
    heads.clear()
    net.generate(video(9), ids(1, 5), max_new_tokens=3, stop_tokens=())
    assert len(heads) == 3


def test_one_video_serves_many_questions_without_copies():
    net, clip = model(), video(9)
    cache = net.encode_video(clip)
    questions = ids(3, 4)
    logits = net(questions, cache=cache, use_cache=True)
    alone = [net(q[None], video=clip).logits for q in questions]
    torch.testing.assert_close(logits.logits, torch.cat(alone))
    assert logits.cache.video_keys[0].untyped_storage().data_ptr() == cache.video_keys[0].untyped_storage().data_ptr()
    assert cache.nbytes == 2 * 3 * 2 * 9 * 6 * 8


def test_a_video_in_host_memory_can_be_moved():
    net = model()
    cache = net.encode_video(video(9), offload=True)
    assert cache.video_keys[0].device.type == "cpu"
    assert torch.equal(cache.video_to("cpu").video_keys[0], cache.video_keys[0])


@pytest.mark.parametrize("padded", [False, True])
def test_greedy_generation_equals_the_whole_model_at_every_step(padded):
    net, clip, tokens = model(), video(9, 2), ids(2, 5)
    mask = torch.ones_like(tokens)
    if padded:
        mask[0, :2] = 0
    got = net.generate(clip, tokens, attention_mask=mask, max_new_tokens=7)
    assert got.shape == (2, 7)
    for _ in range(7):
        following = net(tokens, video=clip, attention_mask=mask).logits[:, -1].argmax(-1)
        tokens, mask = torch.cat((tokens, following[:, None]), 1), torch.nn.functional.pad(mask, (0, 1), value=1)
    assert torch.equal(got, tokens[:, 5:])


def test_right_padded_questions_are_answered_too():
    net, clip, tokens = model(), video(9, 2), ids(2, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    got = net.generate(clip, tokens, attention_mask=mask, max_new_tokens=5)
    alone = [net.generate(clip[:1], tokens[:1], max_new_tokens=5), net.generate(clip[1:], tokens[1:, :3], max_new_tokens=5)]
    assert torch.equal(got, torch.cat(alone))


def test_generation_without_a_video_and_on_a_cache_with_text():
    net, tokens = model(), ids(1, 5)
    whole = net.generate(None, tokens, max_new_tokens=6)
    cache = net(tokens[:, :3], use_cache=True).cache
    assert torch.equal(net.generate(cache, tokens[:, 3:], max_new_tokens=6), whole)


def test_rows_end_with_their_stop_token():
    net, clip, tokens = model(), video(9, 2), ids(2, 5)
    free = net.generate(clip, tokens, max_new_tokens=8)
    stop = int(free[0, 2])
    first = [row.index(stop) if stop in row else 7 for row in free.tolist()]
    got = net.generate(clip, tokens, max_new_tokens=8, stop_tokens=[stop])
    assert got.shape[1] == max(first) + 1
    for row, end in enumerate(first):
        assert torch.equal(got[row, : end + 1], free[row, : end + 1])
        assert (got[row, end:] == got[row, end]).all()
    net.stop_tokens = (stop,)
    assert torch.equal(net.generate(clip, tokens, max_new_tokens=8), got)


def test_stream_yields_while_it_generates():
    net, clip, tokens = model(), video(9), ids(1, 5)
    stream = net.stream(clip, tokens, max_new_tokens=4)
    assert torch.equal(next(stream), net.generate(clip, tokens, max_new_tokens=1)[:, 0])
    assert len(list(stream)) == 3


def test_sampling_draws_among_the_likeliest():
    random = torch.Generator().manual_seed(0)
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 1)
    drawn = generation.pick(logits, 1.0, 0.75, random)
    shares = torch.bincount(drawn, minlength=4) / 4000
    assert shares[2:].sum() == 0  # 0.5 and 0.3 have 0.75 together
    assert abs(shares[0] - 0.625) < 0.04
    everything = torch.bincount(generation.pick(logits, 1.0, 1.0, random), minlength=4) / 4000
    assert abs(everything - torch.tensor([0.5, 0.3, 0.15, 0.05])).max() < 0.04
    assert (generation.pick(logits, 0.01, 1.0, random) == 0).all()
    assert (generation.pick(logits, 1.0, 1e-9, random) == 0).all()


def test_the_same_generator_gives_the_same_answer():
    net, clip, tokens = model(), video(9), ids(1, 5)
    options = {"max_new_tokens": 12, "temperature": 1.5, "top_p": 0.9}
    found = [net.generate(clip, tokens, generator=torch.Generator().manual_seed(s), **options) for s in (3, 3, 4)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


REFUSED = {
    "chunk": (ValueError, lambda net: net.encode_video(video(4), chunk=0)),
    "width": (ValueError, lambda net: net.encode_video(video(4)[..., :9])),
    "integers": (TypeError, lambda net: net.encode_video(torch.zeros(1, 4, 16, dtype=torch.long))),
    "shape": (ValueError, lambda net: net.encode_video(video(4)[0])),
    "rows": (ValueError, lambda net: net.encode_video([video(4), video(4, 2)])),
    "empty": (ValueError, lambda net: net.encode_video([])),
    "lengths": (ValueError, lambda net: net.encode_video(video(4), lengths=[5])),
    "frames": (ValueError, lambda net: net.encode_video(torch.zeros(2, 3, 28, 28))),
    "max_new_tokens": (ValueError, lambda net: net.generate(None, ids(1, 3), max_new_tokens=0)),
    "temperature": (ValueError, lambda net: net.generate(None, ids(1, 3), temperature=-1.0)),
    "top_p": (ValueError, lambda net: net.generate(None, ids(1, 3), top_p=0.0)),
    "videos": (ValueError, lambda net: net.generate(video(4, 2), ids(3, 3))),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused(case):
    error, call = REFUSED[case]
    with pytest.raises(error):
        call(model())
