"""A mixer token by token: the outputs of the whole sequence, on a GPU by replays of a CUDA graph."""

import pytest
import torch

from fused import Mamba, Mamba2, TokenStream

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MIXERS = {
    "Mamba2": lambda: Mamba2(8, d_state=4, headdim=4, ngroups=2, device=DEVICE),
    "Mamba": lambda: Mamba(8, d_state=4, bimamba=False, device=DEVICE),
}


@pytest.fixture(params=MIXERS)
def mixer(request):
    torch.manual_seed(0)
    return MIXERS[request.param]().eval()


def test_tokens_give_the_whole_sequence(mixer):
    u = torch.randn(2, 9, 8, device=DEVICE)
    with torch.no_grad():
        want, state = mixer(u, state=mixer.init_state(2), return_state=True)
    stream = TokenStream(mixer, batch_size=2)
    for _ in range(2):  # the second time after a reset
        got = [stream(u[:, t]) for t in range(9)]
        torch.testing.assert_close(torch.stack(got, 1), want)
        for s, w in zip(stream.state, state, strict=True):
            torch.testing.assert_close(s, w)
        stream.reset()
    assert not any(s.any() for s in stream.state) and not any(y.requires_grad for y in got)


def test_it_goes_on_from_a_prompt(mixer):
    u = torch.randn(1, 9, 8, device=DEVICE)
    with torch.no_grad():
        want = mixer(u)
        _, state = mixer(u[:, :6], state=mixer.init_state(1), return_state=True)
    stream = TokenStream(mixer)
    for mine, s in zip(stream.state, state, strict=True):
        mine.copy_(s)
    for t in range(6, 9):
        torch.testing.assert_close(stream(u[:, t]), want[:, t])


def test_new_values_of_parameters_count(mixer):
    u, stream = torch.randn(1, 8, device=DEVICE), TokenStream(mixer)
    before = stream(u)
    with torch.no_grad():
        mixer.out_proj.weight.mul_(2)
    stream.reset()
    torch.testing.assert_close(stream(u), 2 * before)


def test_autocast_is_that_of_the_constructor(mixer):
    u = torch.randn(1, 8, device=DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        stream = TokenStream(mixer)
        with torch.no_grad():
            want, _ = mixer(u[:, None], state=mixer.init_state(1), return_state=True)
    y = stream(u)
    assert y.dtype == torch.bfloat16 and stream.state[0].dtype == torch.bfloat16
    torch.testing.assert_close(y, want[:, 0])


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_named(mixer):
    with pytest.raises(TypeError, match=r"mixer is a Linear; allowed: a Mamba or Mamba2 with bimamba=False"):
        TokenStream(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="a bidirectional mixer cannot carry a state"):
        TokenStream(Mamba2(8, d_state=4, headdim=4, bimamba=True))
    with pytest.raises(ValueError, match="graph is True, but the mixer is on cpu"):
        TokenStream(MIXERS["Mamba2"]().cpu(), graph=True)
    stream = TokenStream(mixer, batch_size=2)
    for u, found in ((torch.zeros(2, 1, 8), r"\(2, 1, 8\)"), (torch.zeros(1, 8), r"\(1, 8\)"), ([0.0], "list")):
        with pytest.raises(ValueError, match=rf"u is {found}; allowed: \(2, 8\), a token of each sequence"):
            stream(u)
    with pytest.raises(TypeError, match="u is torch.float64; allowed: torch.float32, as the mixer's parameters"):
        stream(torch.zeros(2, 8, dtype=torch.float64, device=DEVICE))
