"""`vit-suite recipes`: which recipes there are, or one of them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class RecipesConfig:
    """List the recipes that come with the package, with their cost and expected score: `vit-suite recipes`. Print one,
    to edit: `vit-suite recipes show NAME > my.yaml`. Use one as it is: `vit-suite pretrain --config NAME`."""

    words: list[str] = field(default_factory=list)
    """`show NAME` prints that recipe; words that are part of recipes' names or titles list those alone; none list
    all."""
