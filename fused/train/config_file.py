"""The configuration of a training from YAML and `key=value`, and back. An unknown key is named, and the nearest to it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from fused.rules import wrong
from fused.train.config import SECTIONS, UNREAD, TrainConfig, flat, unknown


def read_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> TrainConfig:
    """The configuration of a YAML file (None: the defaults), and of `key=value` over it, whose values are YAML too.

    Keys of sections have a dot: `data.frames=16`. Raises ValueError for an unknown key (it names the nearest), a wrong value
    and what is no YAML, FileNotFoundError, ImportError without pyyaml.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        content = parse(Path(path).read_text(), str(path))
        if not isinstance(content, Mapping):
            raise ValueError(f"{path} holds a {type(content).__name__}; allowed: a mapping of keys such as task, data, model")
        tree = _copied(content)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ValueError(f"{override!r} is no override; allowed: key=value, such as data.frames=16")
        branch, (*sections, name) = tree, key.split(".")
        for section in sections:
            inner = branch.setdefault(section, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{key} is given, but {section} is {inner!r}, no section")
            branch = inner
        branch[name] = parse(value, override)
    config = _build(TrainConfig, tree, "")
    for key in _keys(tree):
        if any(key == off or key.startswith(off + ".") for off in UNREAD[str(config.task)]):
            raise ValueError(f"{key} is given; task {config.task!r} does not read it")
    return config


def written(config: TrainConfig) -> str:
    """The effective configuration as YAML, which `read_config` takes."""
    return _yaml().safe_dump(config.described(), sort_keys=False)


def _build(kind: Any, tree: Mapping[str, Any], before: str) -> Any:
    names = [f.name for f in fields(kind)]
    values = {}
    for key, value in tree.items():
        if key not in names:
            raise unknown(f"{before}{key}", [before + name for name in names])
        if key in SECTIONS and not before:
            if not isinstance(value, Mapping):
                raise wrong(key, value, f"a section with the keys {', '.join(f.name for f in fields(SECTIONS[key]))}")
            value = _build(SECTIONS[key], value, f"{key}.")
        values[key] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def _keys(tree: Mapping[str, Any]) -> list[str]:
    """Every key that was given; that of a section by itself only if it is empty."""
    return [key for key in flat(tree)] + [key for key, value in tree.items() if key in SECTIONS and not value]


def _copied(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {str(key): _copied(value) if isinstance(value, Mapping) else value for key, value in tree.items()}


def parse(text: str, source: str) -> Any:
    """What YAML holds; `source` names it in errors. Raises ValueError, ImportError without pyyaml."""
    yaml = _yaml()

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined, misc]
        """1e-4 is a number here; YAML 1.1 asks for a dot and a sign, and would make it a string."""

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is no YAML: {error}") from error


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError("pyyaml is not installed: pip install pyyaml") from error
    return yaml
