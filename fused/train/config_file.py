"""Read the configuration of a training from YAML and `key=value`, and write it. Errors name an unknown key and the nearest."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from textwrap import indent
from typing import Any

from fused.rules import invalid
from fused.train.config import RULES, TrainConfig, all_keys, flatten
from fused.train.config_keys import PATH_KEYS, TASKS, is_read
from fused.train.config_rules import SIZES
from fused.train.config_sections import SECTIONS
from fused.train.language.options import LANGUAGE_TASKS
from fused.train.recipes import PREFIX, recipe_path
from fused.train.unknown_key import unknown_key

# What stands behind a required key that has no value yet; `teacher` is required by the tasks that read it.
MISSING = {
    "task": f"required: {', '.join(TASKS)}",
    "out": "required: the folder of the run",
    "data.train": "required: a folder of videos, or a list of them, to regress with numbers; for retrieval a file of captions",
    "steps": "required: this or epochs",
    "epochs": "required: this or steps",
    "teacher": "required: a folder, or a name in fused.PRETRAINED; for retrieval with loss.uta only",
}


def read_config(path: str | Path | None = None, overrides: Sequence[str] = (), *, complete: bool = True) -> TrainConfig:
    """Return the configuration of a YAML file, or of a recipe as recipe:NAME (None: the defaults), changed by `key=value`.

    Keys in sections have a dot: `data.frames=16`. Values of overrides are YAML too. A section that is null sets nothing. In
    paths, ~ in front is the home folder. With `complete=False` keys that a training needs may be missing.

    Raises ValueError for an unknown key or recipe (the message names the nearest one), a key that a section has twice, a wrong
    value and invalid YAML, FileNotFoundError for a missing file, ImportError without pyyaml.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        name = str(path)
        path = recipe_path(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else Path(os.path.expanduser(path))
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no YAML: {error}") from error
        content = parse_yaml(text, str(path))
        if not isinstance(content, Mapping):
            raise ValueError(f"{path} holds a {type(content).__name__}; allowed: a mapping of keys such as task, data, model")
        tree = _copy(content)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ValueError(f"{override!r} is no override; allowed: key=value, such as data.frames=16")
        branch, (*sections, name) = tree, key.split(".")
        for section in sections:
            if branch.get(section) is None:
                branch[section] = {}
            branch = branch[section]
            if not isinstance(branch, dict):
                raise ValueError(f"{key} is given, but {section} is {branch!r}, no section")
        branch[name] = parse_yaml(value, override)
    tree = {key: value for key, value in tree.items() if value is not None or key not in (*SECTIONS, "model")}
    config = _build(TrainConfig, tree, "", complete=complete)
    for key in _given_keys(tree):
        if config.task is not None and not is_read(key, config.task):
            raise ValueError(f"{key} is given; task {config.task!r} does not read it")
    return config


def to_yaml(config: TrainConfig) -> str:
    """Return every key that the task reads, as YAML that `read_config` accepts. Raise ImportError without pyyaml.

    A comment says what a key may be. A required key without a value is null. Without a task every key is there, and those that
    only some tasks read stand behind a #, with the names of these, so that the text can be completed for any task.
    """
    lines = [] if config.task else ["# Keys behind a # are read by the tasks that are named there only.\n"]
    for key, value in config.used_keys().items():
        if key in SECTIONS:
            lines += [f"{key}:\n", *(indent(_entry(config, f"{key}.{name}", inner), "  ") for name, inner in value.items())]
        else:
            lines.append(_entry(config, key, value))
    return "".join(lines)


def _entry(config: TrainConfig, key: str, value: Any) -> str:
    """Return the YAML of a dotted key without its section, with its comment, behind a # if only some tasks read it."""
    readers = [task for task in TASKS if is_read(key, task)]
    hidden = config.task is None and len(readers) < len(TASKS)
    yaml, name = _import_yaml(), key.rpartition(".")[2]
    text = yaml.safe_dump({name: value}, sort_keys=False, width=math.inf)
    if hidden and isinstance(value, list):  # in one line, behind one #
        text = f"{name}: {yaml.safe_dump(value, width=math.inf, default_flow_style=True)}"
    comments = [", ".join(readers)] if hidden else []
    given = {"steps": config.steps, "epochs": config.epochs}
    if value is None and key in MISSING and (key not in given or not any(given.values())):
        comments.append(MISSING[key])
    elif key in RULES and key not in (*MISSING, "model"):
        allowed = "a folder or a list of videos, or null" if key == "data.val" else RULES[key].allowed
        comments.append(allowed.replace("None", "null").replace("True or False", "true or false"))
    if key == "start" and value is None and config.task in LANGUAGE_TASKS:
        comments.append("required: the folder of a model")
    if key == "model" and not value:
        comments.append(f"size: {', '.join(SIZES)}; any field of VideoMambaConfig")
    if comments:
        text = text.replace("\n", f"  # {'; '.join(comments)}\n", 1)
    return indent(text, "# ") if hidden else text


def parse_yaml(text: str, source: str) -> Any:
    """Return the content of YAML; errors call it `source`. Raise ValueError for invalid YAML, ImportError without pyyaml."""
    yaml = _import_yaml()

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined, misc]
        """A loader that refuses duplicate keys, reads 1e-4 as a number, for which YAML 1.1 requires a dot and a sign, and None
        as null, since errors and Python call it so.
        """

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            lines: dict[str, int] = {}
            for key, _ in node.value:
                line = key.start_mark.line + 1
                if isinstance(key.value, str) and key.value in lines:
                    both = f"in line {lines[key.value]} and again in line {line}"
                    raise ValueError(f"{source} has the key {key.value} {both}; allowed: once in a section")
                lines[str(key.value)] = line
            return node

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )
    Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("^None$"), ["N"])
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, RecursionError) as error:  # RecursionError: nested too deeply
        quotes = "; text that begins with * or & stands in quotes" if "anchor" in str(error) or "alias" in str(error) else ""
        raise ValueError(f"{source} is no YAML: {error}{quotes}") from error


def _build(kind: Any, tree: Mapping[str, Any], prefix: str, **options: Any) -> Any:
    """Return the dataclass `kind` with the values of a mapping; `prefix` is that of its keys, such as "data.".

    `options` are further arguments of `kind`.
    """
    names = [f.name for f in fields(kind)]
    values = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name not in names:
            section, _, rest = key.partition(".")
            if key in all_keys():
                raise ValueError(f"{key} is one word; allowed: a section, {section}: {{{rest}: ...}}")
            if isinstance(value, Mapping) and value:  # of an unknown section its first key says more
                key += f".{next(iter(value))}"
            raise unknown_key(key, [prefix + known for known in names], all_keys())
        if name in SECTIONS and not prefix:
            if not isinstance(value, Mapping):
                raise invalid(key, value, f"a section with the keys {', '.join(f.name for f in fields(SECTIONS[name]))}")
            value = _build(SECTIONS[name], value, f"{name}.")
        if key == "graph" and isinstance(value, bool):  # on and off are YAML's true and false
            value = "on" if value else "off"
        if key in PATH_KEYS and isinstance(value, str):
            value = os.path.expanduser(value)
        values[name] = tuple(value) if isinstance(value, list) else value
    return kind(**values, **options)


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
        raise ImportError("pyyaml is not installed: pip install 'videomamba-bench[train]'") from error
    return yaml
