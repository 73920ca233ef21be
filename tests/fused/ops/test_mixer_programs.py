"""The programs that a mixer is said to need, and that it starts to compile, are those that it launches."""

import pytest
import torch

pytest.importorskip("triton", reason="the convolution's kernels are Triton's")

from fused.compile.programs import programs_of  # noqa: E402
from fused.models.videomamba.config import VideoMambaConfig  # noqa: E402
from fused.modules.mamba import Mamba  # noqa: E402
from fused.ops.selective_scan import launch  # noqa: E402
from fused.ops.selective_scan.kernel_source import source  # noqa: E402
from fused.runtime import nvrtc  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # Triton 3.6's interpreter
    pytest.mark.skipif(torch.cuda.is_available(), reason="launches nothing"),
]
MODES = {"inference": (False, "native"), "training": (True, "native"), "keeping": (True, "native_kept")}
NEEDED = {"inference": [False], "training": [False, True, True], "keeping": [True, True]}  # whether each stores tile states


class Launches:
    """Stands in for compiled kernels."""

    def launch(self, *arguments):
        """Launch nothing."""


@pytest.fixture
def log(monkeypatch):
    """Everything that is started and asked for: ("start" or "module", source, macros)."""
    events = []
    launch.start_compiling.cache_clear()
    monkeypatch.setattr(nvrtc, "start", lambda source, macros, device: events.append(("start", source, macros)))
    monkeypatch.setattr(nvrtc, "module", lambda source, macros, device: events.append(("module", source, macros)) or Launches())
    yield events
    launch.start_compiling.cache_clear()


def run(mixer, gradients, backend, dtype, state=None):
    tokens = torch.randn(2, 5, mixer.d_model, dtype=dtype, requires_grad=gradients)
    with torch.set_grad_enabled(gradients):
        out = mixer(tokens, state, state is not None, backend=backend)
    out = out if state is None else out[0]
    if gradients:
        out.float().sum().backward()


def named(events, kind):
    return dict.fromkeys((code, macros) for what, code, macros in events if what == kind)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bimamba", [True, False])
@pytest.mark.parametrize("width, options", [(32, {}), (24, {}), (16, {"d_state": 20}), (3, {"d_state": 5})])
def test_what_is_started_is_what_is_launched(mode, bimamba, width, options, log):
    """In order of use, and with sizes for which the kernels have other code; all of it before the first launch."""
    gradients, backend = MODES[mode]
    run(Mamba(width, bimamba=bimamba, **options), gradients, backend, torch.float32)
    started = list(named(log, "start"))
    assert started == list(named(log, "module")) and len(started) == len(NEEDED[mode])
    assert [dict(macros)["STORE_TILE_STATES"] for _, macros in started] == NEEDED[mode]
    assert [event[0] for event in log[: len(started)]] == ["start"] * len(started)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_stream_starts_what_it_launches(gradients, log):
    mixer = Mamba(24, bimamba=False)
    run(mixer, gradients, "native", torch.float32, mixer.init_state(2))
    assert list(named(log, "start")) == list(named(log, "module")) and len(named(log, "start")) == 1 + gradients


@pytest.mark.parametrize("width", [32, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_programs_of_a_model(width, dtype, log):
    """`fused.compile` lists all that inference and training launch."""
    config = VideoMambaConfig.tiny(embed_dim=width, num_frames=2, img_size=32)
    for gradients, backend in MODES.values():
        run(Mamba(config.embed_dim).to(dtype), gradients, backend, dtype)
    assert set(named(log, "module")) == {(source(p.name), p.defines) for p in programs_of(config, dtype, 2)}
