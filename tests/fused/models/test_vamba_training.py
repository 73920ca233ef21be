"""What a training of Vamba begins with, and a short one on packed samples."""

import pytest
import torch
from rule import assert_rule, outcome

from fused import Vamba, VambaConfig, VambaDecoderLayer
from fused.models.vamba.training import init_cross_attention, init_mixers, select_trainable

SIZES = {
    "vocab_size": 23, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "mrope_section": (1, 1, 1), "mixer": {"headdim": 8, "d_state": 4},
}  # fmt: skip


def model():
    torch.manual_seed(0)
    return Vamba(VambaConfig(**SIZES))


def batch():
    """Two samples in a row, each with a video of its own."""
    g = torch.Generator().manual_seed(1)
    positions = torch.cat((torch.arange(5), torch.arange(4))).expand(3, 1, -1)
    ids = torch.randint(0, 23, (1, 9), generator=g)
    video = torch.randn(1, 12, 16, generator=g)
    return {"input_ids": ids, "video": video, "position_ids": positions, "encoder_seq_lens": [[7, 5]], "labels": ids}


def test_cross_attention_begins_as_self_attention():
    net = model()
    init_cross_attention(net)
    for layer in net.model.layers:
        pairs = zip(layer.cross_attn.parameters(), layer.self_attn.parameters(), strict=True)
        assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in pairs)


def test_mixers_begin_as_upstreams():
    net = Vamba(VambaConfig(**SIZES | {"hidden_size": 128, "mixer": {"d_state": 64}}))
    init_mixers(net)
    mixer = net.model.layers[0].vision_mixer.mixer
    assert mixer.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    edge = (256 * 3) ** -0.5
    assert mixer.out_proj.weight.abs().max() <= edge
    assert mixer.out_proj.weight.std().item() == pytest.approx(edge / 3**0.5, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("has_video", [True, False], ids=["a video", "text only"])
def test_alphas_gradient_is_one_sum_rounded_once(has_video, dtype):
    """Half of the tokens read and learn almost the opposite of the other half, so that the sum over tokens cancels."""

    def formula(s, alpha, c=None):
        return (alpha * s if c is None else alpha * s + (1 - alpha) * c,)

    def layers(s, alpha, c=None):
        layer = VambaDecoderLayer(VambaConfig(**SIZES))
        del layer.alpha
        layer.alpha = alpha
        return (layer.balance(s, c),)

    samples = []
    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        s, c, dout = (torch.randn(2, 33, 16, generator=g) for _ in range(3))
        given = {"s": torch.cat((s, s), 1), "alpha": 0.1 + 0.8 * torch.rand(1, generator=g)}
        given |= {"c": torch.cat((c, c), 1)} if has_video else {}
        given, dout = {k: v.to(dtype) for k, v in given.items()}, [torch.cat((dout, -dout * (1 + 2**-5)), 1).to(dtype)]
        truth, plain = (outcome(formula, given, dout, precision) for precision in (torch.float64, torch.float32))
        samples.append((outcome(layers, given, dout, None), truth, plain))
    assert_rule(samples)


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_a_stage_learns_its_parts_and_nothing_without_a_gradient(stage):
    net = model()
    net.visual = torch.nn.ModuleDict({"merger": torch.nn.Linear(2, 2), "blocks": torch.nn.Linear(2, 2)})
    learnt = select_trainable(net, stage)
    assert learnt == [name for name, p in net.named_parameters() if p.requires_grad]
    if stage == "sft":
        assert {n.partition(".")[0] for n in learnt} == {"model", "visual"} and "visual.merger.weight" in learnt
        assert "model.embed_tokens.weight" in learnt and "lm_head.weight" not in learnt and "visual.blocks.weight" not in learnt
    else:
        assert {n.split(".")[3] for n in learnt} == {"cross_attn", "vision_mixer", "alpha"}
    assert not any(n.startswith("model.layers.2.vision_mixer") for n in learnt)
    net(**batch()).loss.backward()
    without = [n for n, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assert all(n.startswith("visual.") for n in without)
    with pytest.raises(ValueError, match="stage"):
        select_trainable(net, "stage1")


@pytest.mark.usefixtures("unchecked")
def test_other_models_are_refused():
    with pytest.raises(TypeError, match="Vamba"):
        select_trainable(torch.nn.Linear(1, 1), "sft")


def test_recomputed_layers_give_the_same_gradients_in_less_memory():
    net = model().double()
    given = {k: v.double() if k == "video" else v for k, v in batch().items()}
    found, kept = [], []
    for recompute in (False, True):
        net.recompute_layers = recompute
        saved = 0

        def count(x):
            nonlocal saved
            saved += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            loss = net(**given).loss
        found.append(torch.autograd.grad(loss, list(net.parameters()), allow_unused=True))
        kept.append(saved)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert kept[1] < kept[0] / 2


def test_a_layer_that_runs_again_reads_as_many_keys_as_its_mask_has():
    net, found = model().double(), []
    given = {k: v.double() if k == "video" else v for k, v in batch().items()}
    given["attention_mask"] = torch.block_diag(torch.ones(5, 5), torch.ones(4, 4)).tril().long()[None, None]
    for recompute in (False, True):
        net.recompute_layers = recompute
        found.append(torch.autograd.grad(net(**given).loss, list(net.parameters()), allow_unused=True))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_cache_is_kept_also_where_layers_would_be_recomputed():
    net = model()
    net.recompute_layers = True
    ids = torch.arange(5)[None]
    out = net(ids, video=torch.randn(1, 7, 16), use_cache=True)
    assert out.cache.text_length == 5 and out.cache.video_length == 7


def test_a_short_pretraining_learns():
    net, given = model(), batch()
    init_cross_attention(net)
    init_mixers(net)
    select_trainable(net, "pretrain")
    net.recompute_layers = True
    frozen = net.lm_head.weight.clone()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = net(**given).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(net.lm_head.weight, frozen)


@pytest.fixture
def world():
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_sharded_layers_give_the_same_loss_and_gradients(world):
    """FSDP2, a layer at a time, in bfloat16: angles stay in float32 at positions that bfloat16 cannot tell apart."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    given = batch()
    given["position_ids"] = torch.where(given["position_ids"] > 0, given["position_ids"] + 1000, 0)
    plain = model().bfloat16()
    for module in plain.modules():
        for name, p in module.named_parameters(recurse=False):
            if name in ("A_log", "D"):
                p.data = p.data.float()
    due = plain(**given | {"video": given["video"].bfloat16()}).loss
    sharded, mesh = model(), init_device_mesh("cpu", (1,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(sharded, mesh=mesh, mp_policy=policy)
    for recompute in (False, True):
        sharded.recompute_layers = recompute
        loss = sharded(**given).loss
        torch.testing.assert_close(loss, due, rtol=2e-3, atol=0)
        loss.backward()
        assert sharded.model.layers[0].alpha.grad is not None
        sharded.zero_grad()
