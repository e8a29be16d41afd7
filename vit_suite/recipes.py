"""The recipes that come with the package: YAML configs whose headers say command, source, expected score and cost.

`configs/` stands at the top of a checkout. A wheel carries the same files as `vit_suite/configs` (setup.py copies them
there). A recipe is named by its path without the ending: `dino/cifar10_cpu`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from vit_suite.errors import UserError, unknown_name

HEADER_LINE = re.compile(r"#   (\w+)\s+(.*)")


class Recipe(NamedTuple):
    """What the header of a recipe says."""

    name: str
    title: str
    """The first line: what it trains, on what, on which machine."""
    facts: dict[str, str]
    """`command`, `source`, `expected`, `cost`, and others, each in one line."""


def folder() -> Path:
    """Where the recipes lie: beside the code in a wheel, one level up in a checkout."""
    here = Path(__file__).parent
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"


def names() -> list[str]:
    """All recipes, sorted."""
    root = folder()
    return sorted(str(path.relative_to(root).with_suffix("").as_posix()) for path in root.rglob("*.yaml"))


def find(name: str) -> Path:
    """The file of a recipe. UserError with the nearest name when there is none."""
    known = names()
    word = name.removeprefix("configs/").removesuffix(".yaml")
    if word not in known:
        raise unknown_name("recipe", name, known, shown=40)
    return folder() / f"{word}.yaml"


def config_file(word: str) -> Path:
    """What `--config WORD` means: a file of the user's own, else the recipe of that name.

    UserError when it is neither, with the nearest file in that folder or the nearest recipe.
    """
    path = Path(word).expanduser()
    if path.exists() or path.suffix not in ("", ".yaml", ".yml"):
        return path
    try:
        return find(word)
    except UserError:
        if path.suffix:
            return path  # the name of a file that does not exist: its reader suggests the nearest one
        raise


def read(name: str) -> Recipe:
    """The header of a recipe."""
    lines = [line.rstrip() for line in find(name).read_text(encoding="utf-8").splitlines()]
    title = lines[0].removeprefix("# ")
    facts: dict[str, str] = {}
    key = ""
    for line in lines[1:]:
        if found := HEADER_LINE.match(line):
            key, facts[found[1]] = found[1], found[2]
        elif key and line.startswith("#    "):
            facts[key] += " " + line.lstrip("# ")
        else:
            key = ""
    return Recipe(name, title, facts)
