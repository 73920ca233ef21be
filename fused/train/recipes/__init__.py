"""The published trainings of VideoMamba, a YAML file each: `python -m fused.train --config recipe:k400_tiny_f8`.

A recipe is a configuration without `out`, `data.train` and what else its user has to give. The comments at its head say what it
trains, what was published of it, where its numbers come from, and in what it differs from upstream.
"""

import difflib
from pathlib import Path

PREFIX = "recipe:"
FOLDER = Path(__file__).resolve().parent


def recipe_names() -> list[str]:
    """Return the names of all recipes, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """Return the file of a recipe. Raise ValueError, with the nearest names, for an unknown one."""
    names = recipe_names()
    if name not in names:
        near = ", ".join(difflib.get_close_matches(name, names, 5, 0.0))
        allowed = f"{PREFIX} and a name that --recipes lists; the nearest are {near}"
        raise ValueError(f"config is '{PREFIX}{name}'; allowed: {allowed}")
    return FOLDER / f"{name}.yaml"


def describe_recipe(name: str) -> str:
    """Return the first sentence of a recipe's head: "VideoMamba-Ti on Kinetics-400, ...: published top-1 76.9" for one."""
    head = recipe_path(name).read_text(encoding="utf-8").partition("\ntask:")[0].replace("\n#", "")
    return head.removeprefix("# ").partition(". ")[0].removesuffix(".")
