"""The commands that the documents show, read from their blocks of code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(path for path in ROOT.glob("*.md") if path.name != "README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
SHELL = ("", "sh", "bash")
"""Languages of a fenced block that may hold commands."""


class Shown(NamedTuple):
    """A command of a document."""

    page: str
    launcher: str
    """What stands before the program: `torchrun ...`, `srun`, or nothing."""
    line: str
    """The words after `vit-suite`, or the whole line of another program."""


def blocks(path: Path, languages: tuple[str, ...]) -> list[str]:
    """The fenced blocks of a page in one of the languages, and, where `""` is one, its indented blocks."""
    found: list[str] = []
    language: str | None = None
    indented: list[str] = []
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            if language is None:
                language, lines = line[3:].strip(), []
            else:
                found += ["\n".join(lines)] if language in languages else []
                language = None
        elif language is not None:
            lines.append(line)
        elif line.startswith("    ") and "" in languages:
            indented.append(line[4:])
    return [*found, "\n".join(indented)]


def command_lines(path: Path) -> list[str]:
    """The lines of a page's shell blocks, continued ones joined, comments off."""
    text = re.sub(r"\\\n\s*", " ", "\n".join(blocks(path, SHELL)))
    return [re.split(r"\s#\s", line)[0].strip().removeprefix("$ ") for line in text.splitlines()]


def documented() -> list[Shown]:
    """Every `vit-suite ...`, README first, in the order of the pages."""
    found = []
    for path in PAGES:
        for line in command_lines(path):
            if match := re.match(
                r"((?:torchrun|srun|CUDA_VISIBLE_DEVICES).*?)?\s*(?:-m vit_suite|vit-suite) (.+)", line
            ):
                found.append(Shown(path.name, match[1] or "", match[2].strip()))
    return found


def scripts() -> list[Shown]:
    """Every `python scripts/...` and `bash scripts/...`."""
    pattern = r"(?:python|bash)?(.*?)\s*(scripts/\S+\.(?:py|sh).*)"
    return [
        Shown(path.name, match[1].strip(), match[2])
        for path in PAGES
        for line in command_lines(path)
        if (match := re.match(pattern, line)) and not line.startswith(("|", "`"))
    ]


def words_of(line: str) -> list[str]:
    """The words of a command; `...` stands for options that the reader adds."""
    line = re.sub(r"--config \.\.\.", "--config dino/smoke", line.split(" > ")[0].split(";")[0])
    return [word for word in shlex.split(line, comments=True) if word != "..."]
