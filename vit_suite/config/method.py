"""What the options of every method have in common."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class MethodConfig:
    """Options of a training method. A subclass sets `name` to a Literal of the method's name in registry.py."""

    name: str
    """Method."""
