"""What is chosen by name is one row of a table: the words that an option allows are the rows of its table."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from vit_suite.attention.formats import FORMATS
from vit_suite.cli import COMMANDS
from vit_suite.config import AttentionConfig, DataConfig, LoggerConfig, SiTConfig
from vit_suite.data.registry import DATASETS
from vit_suite.options import attribute_docs
from vit_suite.registry import METHODS, Column
from vit_suite.training.loggers import LOGGERS
from vit_suite.training.scores import SCORES
from vit_suite.views.corruption import CORRUPTIONS

ROOT = Path(__file__).parents[1]


def words(cls: type, name: str) -> set[str]:
    """The words of a Literal, also of one in a list."""
    hint = get_type_hints(cls)[name]
    return {word for inner in (hint, *get_args(hint)) for word in get_args(inner) if isinstance(word, str)}


def test_words_of_options_are_rows():
    assert words(SiTConfig, "corruption") == set(CORRUPTIONS)
    assert words(AttentionConfig, "formats") == set(FORMATS)
    switches = {name for name, hint in get_type_hints(LoggerConfig).items() if hint is bool and "_" not in name}
    assert {"csv", *switches} == set(LOGGERS)


def test_help_names_every_data_set():
    known = attribute_docs(DataConfig)["name"]
    assert all(name in known.replace(".", " ").split() for name in DATASETS), known


def test_scores_of_methods_exist():
    for name in METHODS:
        assert set(Column("module")[name].online_scores) <= set(SCORES), name


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_a_module_of_its_name(name):
    command = COMMANDS[name]
    assert command.run == f"vit_suite.commands.{name}:run"
    assert callable(importlib.import_module(f"vit_suite.commands.{name}").run)


def test_architecture_names_every_package_and_table():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for package in (ROOT / "vit_suite").iterdir():
        if package.is_dir() and (package / "__init__.py").is_file():
            assert f"`{package.name}/`" in text, package.name
    for table in ("METHODS", "DATASETS", "COMMANDS", "SCORES", "LOGGERS", "CORRUPTIONS", "FORMATS"):
        assert f"`{table}`" in text, table
