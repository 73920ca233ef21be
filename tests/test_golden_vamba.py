"""Numbers that upstream's Vamba gave, forward and backward, reproduced by both packages."""


import pytest
import torch
from golden import assert_golden, assert_sums, fill, golden

SIZES = {
    "vocab_size": 61, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6, "num_key_value_heads": 2,
    "mrope_section": (1, 1, 2), "mixer": {"expand": 2, "headdim": 16, "d_state": 16},
}  # fmt: skip
LAYER_GRADIENTS = {
    "self_attn.q_proj.weight": "253.64632 5696.25261", "self_attn.k_proj.bias": "-4.35658 19.24202",
    "cross_attn.q_proj.weight": "-48.06550 608.18242", "cross_attn.k_proj.weight": "20.05897 403.00435",
    "cross_attn.v_proj.bias": "-5.32012 108.46019", "cross_attn.o_proj.weight": "-0.12103 980.65632",
    "input_layernorm.weight": "159.09083 314.07380", "mlp.gate_proj.weight": "292.80163 13705.47174",
    "vision_mixer.norm.weight": "-152.55651 1048.94080",
    "vision_mixer.mixer.in_proj.weight": "1289.45588 88904.24637", "vision_mixer.mixer.A_log": "33.13007 40.68646",
    "vision_mixer.mixer.dt_bias": "-14.48620 56.24790", "alpha": "148.75697 148.75697",
}  # fmt: skip
GRADIENTS = {
    "model.layers.0.alpha": "0.924672 0.924672", "model.layers.1.alpha": "-0.027211 0.027211",
    "model.layers.0.vision_mixer.mixer.in_proj.weight": "-0.633117 43.157412",
    "model.layers.0.cross_attn.k_proj.weight": "0.590129 12.571817", "model.embed_tokens.weight": "-9.002428 81.432262",
}  # fmt: skip


def config(package, layers=2, **options):
    return package.VambaConfig(**SIZES | {"num_hidden_layers": layers} | options)


def model(package, **options):
    return golden(package.Vamba(config(package, **options)))


def ids():
    return ((7 * torch.arange(13) + 3) % 61)[None]


def video(tokens=29):
    return fill(1, tokens, 48, phase=5)


def test_v1_layer_forward_and_gradients(package):
    layer = golden(package.VambaDecoderLayer(config(package), 0))
    assert layer.alpha.item() == pytest.approx(0.6723521, abs=1e-7)
    text, tokens = fill(1, 11, 48, phase=7).requires_grad_(), fill(1, 37, 48, phase=5).requires_grad_()
    t, v = layer(text, tokens, position_ids=torch.arange(11).expand(3, 1, -1))
    assert_golden(t, "-0.156249 -1.653001 -1.558785 -0.374343 -0.230740 0.149965")
    assert_golden(t.flatten()[-3:], "1.461567 -1.135065 0.162783")
    assert_sums(t, "-14.34264", "386.48707")
    assert_golden(v, "0.952998 -0.494795 1.201482 1.411485 2.473169 -1.626220")
    assert_golden(v.flatten()[-3:], "-1.351088 0.738301 0.719871")
    assert_sums(v, "80.75265", "1678.44905")
    (t.square().sum() + v.square().sum()).backward()
    found = dict(layer.named_parameters())
    for name, sums in LAYER_GRADIENTS.items():
        assert_sums(found[name].grad, *sums.split())
    assert_sums(text.grad, "167.53853", "2370.20696")
    assert_sums(tokens.grad, "195.11036", "10282.50531")


def test_v2_model_forward_and_gradients(package):
    net, tokens = model(package), video().requires_grad_()
    assert [round(layer.alpha.item(), 7) for layer in net.model.layers] == [0.4611883, 0.6286427]
    out = net(ids(), video=tokens, labels=ids())
    assert_golden(out.logits, "0.514215 0.771026 0.129171 0.229724 -0.485268 -0.698677")
    assert_golden(out.logits[0, -1], "0.362302 -1.422609 0.847547 0.626265 -1.905366")
    assert_sums(out.logits, "-56.82913", "619.29724")
    assert_golden(out.loss, "4.650006")
    out.loss.backward()
    found = dict(net.named_parameters())
    for name, sums in GRADIENTS.items():
        assert_sums(found[name].grad, *sums.split())
    assert_sums(tokens.grad, "0.938881", "8.457490")
    assert all(p.grad is None for name, p in found.items() if name.startswith("model.layers.1.vision_mixer"))


def test_v3_video_normed_before_keys(package):
    logits = model(package, cross_attn_use_layer_norm=True)(ids(), video=video()).logits
    assert_golden(logits, "0.732161 0.833808 -0.024716 0.453276 -0.288114 -0.785009")
    assert_sums(logits, "-33.27836", "616.24194")


def test_v4_without_alpha(package):
    net = package.Vamba(config(package, use_alpha_balancing=False))
    assert not any(name.endswith("alpha") for name in net.state_dict())
    logits = golden(net)(ids(), video=video()).logits
    assert_golden(logits, "0.327538 0.062239 0.250545 0.826913 -0.197399 -0.027017")
    assert_sums(logits, "-57.68626", "615.63870")


@pytest.mark.parametrize("none", [False, True], ids=["no tokens", "no video"])
def test_v5_text_only(package, none):
    logits = model(package)(ids(), video=None if none else video(0)).logits
    assert_golden(logits, "1.095634 0.830250 -0.415943 -0.257699 0.223530 -0.473109")
    assert_sums(logits, "-28.24637", "596.31744")


@pytest.mark.parametrize("as_tensor", [False, True], ids=["lists", "tensor"])
def test_v6_packed(package, as_tensor):
    positions = torch.cat((torch.arange(8), torch.arange(5))).expand(3, 1, -1)
    lengths = torch.tensor([[19, 10]]) if as_tensor else [[19, 10]]
    logits = model(package)(ids(), video=video(), position_ids=positions, encoder_seq_lens=lengths).logits
    assert_golden(logits, "0.529274 0.929677 0.401173 0.584502 -0.470239 -0.799387")
    assert_golden(logits.flatten()[-3:], "-0.879551 -1.000898 -0.454132")
    assert_sums(logits, "-1.09189", "634.78958")


def test_v7_rotated_cross_attention(package):
    grid = torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)).t()[:, None]
    net = model(package, cross_attn_use_position_embeddings=True)
    logits = net(ids(), video=video(24), encoder_position_ids=grid).logits
    assert_golden(logits, "0.597295 0.875554 0.172867 0.481652 -0.622303 -0.884425")
    assert_sums(logits, "-37.85967", "619.23510")


def test_v8_positions_of_three_axes(package):
    rest = list(range(4, 11))
    axes = [[0, 1, 2, 2, 2, 2, *rest], [0, 1, 2, 2, 3, 3, *rest], [0, 1, 2, 3, 2, 3, *rest]]
    logits = model(package)(ids(), video=video(), position_ids=torch.tensor(axes)[:, None]).logits
    assert_golden(logits.flatten()[-3:], "0.346634 -0.261405 0.005878")
    assert_sums(logits, "-42.14319", "613.00852")
