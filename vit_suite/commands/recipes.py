"""`vit-suite recipes`: the recipes in the package, with cost and expected score; `recipes show NAME` prints one."""

from __future__ import annotations

import shutil
import textwrap

from vit_suite import recipes
from vit_suite.config import RecipesConfig
from vit_suite.errors import UserError

SHOWN = ("expected", "cost")
"""What the list says of a recipe, below its title."""


def run(cfg: RecipesConfig) -> None:
    """Print the list, or one recipe."""
    if cfg.words[:1] == ["show"]:
        if len(cfg.words) != 2:
            raise UserError("recipes show: expected the name of one recipe, such as dino/cifar10_cpu")
        print(recipes.find(cfg.words[1]).read_text(encoding="utf-8"), end="")
        return
    found = [recipes.read(name) for name in recipes.names()]
    shown = [one for one in found if all(word.lower() in f"{one.name} {one.title}".lower() for word in cfg.words)]
    if not shown:
        raise UserError(f"no recipe has '{' '.join(cfg.words)}' in its name or title; `vit-suite recipes` lists all.")
    width = min(120, shutil.get_terminal_size((100, 24)).columns)
    for recipe in shown:
        print(recipe.name)
        lines = [recipe.title, *(f"{key:<9} {recipe.facts.get(key, 'not stated')}" for key in SHOWN)]
        for line in lines:
            print(textwrap.fill(line, width, initial_indent="  ", subsequent_indent=" " * 12))
        print()
    print("use one:   vit-suite pretrain --config NAME --data.root DIR")
    print("edit one:  vit-suite recipes show NAME > my.yaml; vit-suite pretrain --config my.yaml --data.root DIR")
