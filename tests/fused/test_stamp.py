"""The stamp of a validated backend: found only for the very sources and machine it was written for."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fused import backends, stamp
from fused.stamp import KEY, Validation, fingerprint, validation, write_validation


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "videomamba-bench" / "validation"


def passed(**changes):
    run = {"run": "2026-11-21T04-00-00", "date": "2026-11-21", "checks": ("forward", "backward")}
    return Validation(**{**stamp.key("torch", torch.float32, "cpu"), **run, **changes})


def test_round_trip(cache):
    assert validation("torch", torch.float32, "cpu") is None
    path = write_validation(passed())
    assert path.parent == cache and path.suffix == ".json" and list(cache.iterdir()) == [path]
    assert validation("torch", torch.float32, "cpu") == passed()
    chosen = backends.choose("auto", "cpu")  # "cpu" where there is a compiler
    assert write_validation(passed(backend=chosen)).parent == cache
    assert validation("auto", torch.float32, "cpu") == passed(backend=chosen)


def test_a_newer_run_replaces_the_stamp(cache):
    write_validation(passed())
    write_validation(passed(run="later"))
    assert validation("torch", device="cpu").run == "later" and len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("field", KEY)
def test_every_field_of_the_key_matters(field, monkeypatch):
    write_validation(passed())
    now = stamp.key("torch", torch.float32, "cpu")
    monkeypatch.setattr(stamp, "key", lambda *_: now | {field: "another"})
    assert validation("torch", torch.float32, "cpu") is None


def test_another_dtype_is_another_stamp():
    write_validation(passed())
    assert validation("torch", torch.bfloat16, "cpu") is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"checks": []}', '{"checks": null}'])
def test_a_stamp_that_cannot_be_read_is_none(content):
    write_validation(passed()).write_text(content)
    assert validation("torch", torch.float32, "cpu") is None


def test_a_stamp_whose_content_belies_its_name_is_none():
    path = write_validation(passed())
    path.write_text(json.dumps(json.loads(path.read_text()) | {"gpu": "another"}))
    assert validation("torch", torch.float32, "cpu") is None


def test_fingerprint_follows_names_and_bytes(tmp_path, monkeypatch):
    package = tmp_path / "sample_package"
    (package / "kernels").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('found, not imported')")
    (package / "kernels" / "scan.cu").write_text("a")
    monkeypatch.syspath_prepend(tmp_path)
    prints = [fingerprint("sample_package")]
    (package / "notes.md").write_text("not a source")
    assert fingerprint("sample_package") == prints[0]
    (package / "kernels" / "scan.cu").write_text("b")
    prints.append(fingerprint("sample_package"))
    (package / "kernels" / "scan.cu").rename(package / "kernels" / "scan2.cu")
    prints.append(fingerprint("sample_package"))
    assert len(set(prints)) == 3
    assert fingerprint("no_such_package") is None


def test_fingerprint_does_not_follow_the_order_of_the_file_system(monkeypatch):
    expected, listed = fingerprint("fused"), Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: reversed(list(listed(self, pattern))))
    assert fingerprint("fused") == expected


def test_reminds_once_and_only_on_cuda(caplog, monkeypatch):
    caplog.set_level(logging.INFO, "fused")
    stamp.remind.cache_clear()
    monkeypatch.setattr(stamp, "validation", lambda *_: None)
    for _ in range(2):
        stamp.remind("torch", torch.float32, torch.device("cpu"))
        stamp.remind("torch", torch.float32, torch.device("cuda"))
    stamp.remind("torch", torch.bfloat16, torch.device("cuda"))
    assert [("nox -s parity" in r.getMessage(), r.levelname) for r in caplog.records] == [(True, "INFO")] * 2
    monkeypatch.setattr(stamp, "validation", lambda *_: replace(passed(), gpu="H200"))
    stamp.remind("torch", torch.float16, torch.device("cuda"))
    assert len(caplog.records) == 2
    stamp.remind.cache_clear()
