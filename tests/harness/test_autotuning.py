"""Rivals' kernels that tune themselves are compiled in threads, and chosen as before."""

import importlib
import threading

import pytest

from harness.baselines import autotuning


class Kernel:
    """Stands in for a Triton kernel: it compiles in the same time as another configuration, or never."""

    fn = staticmethod(lambda: None)

    def __init__(self):
        self.both, self.compiled, self.runs = threading.Barrier(2, timeout=10), [], []

    def run(self, *args, warmup, BLOCK, **options):
        if warmup:
            self.both.wait()
            if BLOCK == 64:
                raise RuntimeError("does not compile")
            self.compiled.append((args, BLOCK))
        else:
            self.runs.append(BLOCK)


def test_configurations_are_compiled_at_once_and_then_tried(monkeypatch):
    tuners = pytest.importorskip("triton.runtime.autotuner")
    triton = importlib.import_module("triton")
    monkeypatch.setattr(tuners.Autotuner, "prune_configs", tuners.Autotuner.prune_configs)
    monkeypatch.setattr(autotuning, "find_spec", lambda name: name)
    autotuning.compile_in_threads.cache_clear()
    autotuning.compile_in_threads()
    autotuning.compile_in_threads()  # no second time
    kernel, configs = Kernel(), [triton.Config({"BLOCK": 32}), triton.Config({"BLOCK": 64})]
    times = lambda call, quantiles: call() or [len(kernel.runs)] * 3  # noqa: E731
    tuner = tuners.Autotuner(kernel, ["x"], configs, [], None, None, do_bench=times)
    tuner.run("x", grid=(1,), warmup=False)
    assert kernel.compiled == [(("x",), 32)] and kernel.runs == [32, 64, 32]
    tuner.run("x", grid=(1,), warmup=False)
    assert kernel.runs == [32, 64, 32, 32]
    autotuning.compile_in_threads.cache_clear()


def test_nothing_happens_without_mamba_ssm(monkeypatch):
    monkeypatch.setattr(autotuning, "find_spec", lambda name: None)
    autotuning.compile_in_threads.cache_clear()
    autotuning.compile_in_threads()
    autotuning.compile_in_threads.cache_clear()
