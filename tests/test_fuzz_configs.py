"""Configurations with a value that nothing allows: an error that names the field and the value, or a configuration."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from fuzzing import HOSTILE, examples
from hypothesis import given
from hypothesis import strategies as st

from fused import VambaConfig, VideoMambaConfig
from fused.evaluate.settings import Settings, read_settings
from fused.models.videomamba.hub import read_description
from fused.train.config_file import read_config, to_yaml

VAMBA = {
    "vocab_size": 16, "hidden_size": 12, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "mrope_section": (1, 1, 1),
}  # fmt: skip
KINDS = {"VideoMamba": (VideoMambaConfig, {}), "Vamba": (VambaConfig, VAMBA), "evaluation": (Settings, {})}
TRAINING = ("task=finetune", "out=run", "data.train=videos", "steps=3")
WORDS = st.sampled_from([
    "null", "true", "-1", "0", "1e30", "1.5", ".nan", ".inf", "''", "x", "[]", "[1, x]", "{a: 1}", "~", "{", "[", "\0", "ü",
    "!!python/object/apply:os.system [false]", "&a [*a]", "2001-01-01", "0x1F",
])  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("unchecked")
def test_a_hostile_value(kind: str) -> None:
    cls, valid = KINDS[kind]
    assert cls(**valid)

    @examples()
    @given(st.sampled_from([f.name for f in fields(cls)]), st.sampled_from(HOSTILE))
    def run(name: str, value: Any) -> None:
        try:
            cls(**valid | {name: value})
        except (TypeError, ValueError) as error:
            assert name in str(error) or name in RELATED, f"{name}={value!r}: {error}"

    run()


RELATED = ("num_attention_heads", "hidden_size", "views", "crops", "window", "img_size", "patch_size", "stride", "depth",
           "num_frames", "kernel_size")  # fmt: skip  # whose value makes another field's wrong


@pytest.mark.usefixtures("unchecked")
def test_hostile_words_of_a_training_and_an_evaluation() -> None:
    """Nothing is executed, and a configuration that was read is written and read again."""
    config = read_config(None, TRAINING)
    keys = [f"{key}.{inner}" if isinstance(value, dict) else key for key, value in config.used_keys().items()
            for inner in (value if isinstance(value, dict) else [""])]  # fmt: skip

    @examples(0.5)
    @given(st.sampled_from(keys), WORDS)
    def run(key: str, word: str) -> None:
        try:
            found = read_config(None, [*TRAINING, f"{key}={word}"])
        except (TypeError, ValueError) as error:
            assert key.rpartition(".")[2] in str(error) or key.partition(".")[0] in str(error), error
            return
        assert to_yaml(found)

    run()

    @examples(0.5)
    @given(st.sampled_from([f.name for f in fields(Settings)]), WORDS)
    def evaluate(key: str, word: str) -> None:
        try:
            read_settings([f"{key}={word}"], {})
        except (TypeError, ValueError) as error:
            assert key in str(error) or key in RELATED, f"{key}={word}: {error}"

    evaluate()


@pytest.mark.usefixtures("unchecked")
def test_a_damaged_config_json(tmp_path: Path) -> None:
    from fused.io.checkpoint_file import CheckpointError

    path = tmp_path / "config.json"
    text = json.dumps({"img_size": [32, 64], "depth": 2, "num_classes": 2, "id2label": {"0": "a", "1": "b"}, "preprocessing": {
        "frames": 2, "size": [32, 64]}}).encode()  # fmt: skip
    path.write_bytes(text)
    assert read_description(path).labels == ("a", "b")

    @examples()
    @given(st.integers(0, len(text) - 1), st.binary(max_size=6), st.integers(0, 40))
    def run(place: int, noise: bytes, dropped: int) -> None:
        path.write_bytes(text[:place] + noise + text[place + dropped :])
        try:
            read_description(path)
        except CheckpointError as error:
            assert str(path) in str(error)

    run()
