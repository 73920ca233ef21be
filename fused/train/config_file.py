"""Read the configuration of a training from YAML and `key=value`, and write it. Errors name an unknown key and the nearest."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from fused.rules import invalid
from fused.train.config import SECTIONS, UNUSED_KEYS, TrainConfig, flatten, unknown_key


def read_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> TrainConfig:
    """Return the configuration of a YAML file (None: the defaults), changed by `key=value` overrides.

    Keys in sections have a dot: `data.frames=16`. Values of overrides are YAML too. Raises ValueError for an unknown key (the
    message names the nearest one), a wrong value and invalid YAML, FileNotFoundError for a missing file, ImportError without
    pyyaml.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        content = parse_yaml(Path(path).read_text(), str(path))
        if not isinstance(content, Mapping):
            raise ValueError(f"{path} holds a {type(content).__name__}; allowed: a mapping of keys such as task, data, model")
        tree = _copy(content)
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
        branch[name] = parse_yaml(value, override)
    config = _build(TrainConfig, tree, "")
    unused = UNUSED_KEYS[str(config.task)]
    for key in _given_keys(tree):
        if any(key == name or key.startswith(name + ".") for name in unused):
            raise ValueError(f"{key} is given; task {config.task!r} does not read it")
    return config


def to_yaml(config: TrainConfig) -> str:
    """Return every key that the task reads, as YAML that `read_config` accepts. Raise ImportError without pyyaml."""
    return _import_yaml().safe_dump(config.used_keys(), sort_keys=False)


def parse_yaml(text: str, source: str) -> Any:
    """Return the content of YAML; errors call it `source`. Raise ValueError for invalid YAML, ImportError without pyyaml."""
    yaml = _import_yaml()

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined, misc]
        """A loader that reads 1e-4 as a number; YAML 1.1 requires a dot and a sign, and would return a string."""

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is no YAML: {error}") from error


def _build(kind: Any, tree: Mapping[str, Any], prefix: str) -> Any:
    """Return the dataclass `kind` with the values of a mapping; `prefix` is that of its keys, such as "data."."""
    names = [f.name for f in fields(kind)]
    values = {}
    for key, value in tree.items():
        if key not in names:
            raise unknown_key(f"{prefix}{key}", [prefix + name for name in names])
        if key in SECTIONS and not prefix:
            if not isinstance(value, Mapping):
                raise invalid(key, value, f"a section with the keys {', '.join(f.name for f in fields(SECTIONS[key]))}")
            value = _build(SECTIONS[key], value, f"{key}.")
        values[key] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def _given_keys(tree: Mapping[str, Any]) -> list[str]:
    """Return every dotted key that was given; a section's own key only if the section is empty."""
    return [*flatten(tree), *(key for key, value in tree.items() if key in SECTIONS and not value)]


def _copy(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy whose nested mappings are dictionaries, for overrides to change."""
    return {str(key): _copy(value) if isinstance(value, Mapping) else value for key, value in tree.items()}


def _import_yaml() -> Any:
    """Return the package yaml. Raise ImportError that says how to install it."""
    try:
        import yaml
    except ImportError as error:
        raise ImportError("pyyaml is not installed: pip install pyyaml") from error
    return yaml
