"""YAML files, dotted options and Python mappings -> the dataclasses of config.py, or one sentence on what is wrong in
them.

The command line wins over files, a later file over an earlier one, files over defaults, wherever `--config` stands.
Scalars of a file are kept as written and converted by the same rule as on the command line, so that `1e-3`, `no` and
`null` mean the same in both. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vit_suite.config import VERSION, PretrainConfig
from vit_suite.errors import UserError, nearest, quote, short
from vit_suite.options import REQUIRED, Option, Schema, join
from vit_suite.recipes import config_file
from vit_suite.yaml_tree import MOST_BYTES, Node, YAMLProblem, plain, read_tree


class Given(NamedTuple):
    """A value as somebody wrote it: text, None, nested lists of text, or (from Python) anything."""

    value: Any
    where: str  # begins the message about a wrong value
    unknown: str  # begins the message about an unknown key
    argument: bool = False  # from the command line: value is the list of words behind the option


def load_config(
    path: str | os.PathLike | None = None, overrides: Sequence[str] | Mapping[str, Any] = (), cls: type = PretrainConfig
) -> Any:
    """A config object from a YAML file (None: from the defaults) and overrides, which win: either the words of a
    command line (`["--optim.lr", "1e-3"]`) or a mapping, nested or dotted (`{"optim.lr": 1e-3}`). Raises UserError."""
    if isinstance(overrides, Mapping):
        files: list[str] = []
        given = read_mapping(overrides)
    else:
        files, given = read_arguments(overrides)
    layers = [read_yaml(config_file(file)) for file in ([] if path is None else [os.fspath(path)]) + files]
    merged = {key: item for layer in [*layers, given] for key, item in layer.items()}
    return resolve(cls, merged)


def dump_config(config: Any) -> str:
    """A config object as YAML that `load_config` reads back to an equal object."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Lists in one line: `betas: [0.9, 0.999]`."""

    Dumper.add_representer(
        list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
    )
    return yaml.dump(dataclasses.asdict(config), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1000)


def resolve(cls: type, given: Mapping[str, Given]) -> Any:
    """An object of the config class `cls` from what was given and its defaults; UserError names whatever does not
    fit."""
    given = dict(given)
    if (version := given.get("version")) and not version.argument:
        del given["version"]
        if version.value != str(VERSION):
            raise UserError(
                f"{version.where} {version.value}: written for other names of the options, and this vit-suite has"
                f" version {VERSION}: use the vit-suite that wrote it, or rename its options and delete that line."
            )
    schema = Schema(cls, chosen(given))
    values = {}
    # The method first: a wrong one is the cause of wrong options, not one more of them.
    for key in sorted(given, key=lambda key: key not in schema.selectors):
        item = given[key]
        if key in schema.options:
            values[key] = _convert(schema.options[key], item)
        elif key not in schema.groups:
            raise UserError(item.unknown + schema.suggest(key, "--" if item.argument else ""))
        elif item.value not in (None, {}):  # a section that is empty, or whose lines are all comments, is no mistake
            example = next(option for option in schema.options if option.startswith(key + "."))
            raise UserError(f"{item.where}: is a group of options such as {example}, not a value")
    missing = [key for key, option in schema.options.items() if option.default is REQUIRED and key not in values]
    if missing:
        raise UserError("missing required option " + " ".join(f"--{key}" for key in missing))
    return schema.build({key: values.get(key, option.default) for key, option in schema.options.items()})


def chosen(given: Mapping[str, Given]) -> dict[str, Any]:
    """Key -> value of all options; `Schema` picks the class of a group by the value of its selector."""
    return {key: (item.value or [None])[0] if item.argument else item.value for key, item in given.items()}


def _convert(option: Option, item: Given) -> Any:
    value = _join(option, item) if item.argument else item.value
    try:
        return option.convert(value)
    except ValueError:
        wrong = option.culprit(value)
        got = "nothing" if wrong is None or wrong == [] else quote(wrong)
        hint = nearest(wrong, option.choices) if isinstance(wrong, str) else ""
        raise UserError(f"{item.where}: expected {option.expected(wrong)}, got {got}{hint and '.' + hint}") from None


def _join(option: Option, item: Given) -> Any:
    """The words behind an option as one value: a list for a list option, `true` for a switch without a word, else
    exactly one word."""
    words = item.value
    if not words and option.is_switch:
        return "true"
    if not words:
        raise UserError(f"{item.where}: expected {option.type_name}, got nothing")
    whole = len(words) == 1 and (words[0] in ("null", *option.words) or words[0].startswith("["))
    if option.is_list and not whole:
        return words
    if len(words) > 1:
        raise UserError(f"unexpected argument '{short(words[1])}' after {item.where} {short(words[0])}")
    return words[0]


def read_arguments(words: Sequence[str]) -> tuple[list[str], dict[str, Given]]:
    """(files behind --config, the other options) of a command line. It may have `--a b c`, `--a=b`, and `-` for `_` in
    a name. Of an option that stands twice the last one wins."""
    configs: list[list[str]] = []
    given: dict[str, Given] = {}
    values: list[str] | None = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            key, values = name.replace("-", "_"), [value] if equals else []
            if key == "config":
                configs.append(values)
            else:
                given[key] = Given(values, f"--{short(key)}", f"unknown option '--{short(name)}'.", argument=True)
        elif values is None:
            raise UserError(f"unexpected argument '{short(word)}'; options look like --data.root DIR")
        else:
            values.append(word)
    if not all(configs):
        raise UserError("--config: expected a YAML file, got nothing")
    return [file for files in configs for file in files], given


def read_mapping(values: Mapping[str, Any], group: str = "") -> dict[str, Given]:
    """Overrides from Python, nested or with dotted keys."""
    given: dict[str, Given] = {}
    for name, value in values.items():
        key = join(group, str(name))
        if isinstance(value, Mapping) and value:
            given |= read_mapping(value, key)
        else:
            given[key] = Given(
                os.fspath(value) if isinstance(value, os.PathLike) else value,
                short(key),
                f"unknown key '{short(key)}'.",
            )
    return given


def read_yaml(path: str | os.PathLike) -> dict[str, Given]:
    """Every value of a YAML file by its dotted key, as written. An empty file gives nothing."""
    path = Path(path)
    root = _read_file(path)
    given: dict[str, Given] = {}
    if root is None or root.is_null:
        return given
    if root.kind != "mapping":
        raise UserError(f"{path}: expected options as 'key: value' lines, got a {root.kind}")
    _collect(root, "", path, given)
    return given


def read_yaml_list(path: str | os.PathLike) -> list[dict[str, Given]]:
    """One dictionary like that of `read_yaml` for each entry of a YAML file that holds a list; UserError for an empty
    list."""
    path = Path(path)
    root = _read_file(path)
    if root is None or root.kind != "sequence" or not root.items:
        got = "nothing" if root is None else f"a {root.kind}"
        raise UserError(f"{path}: expected a list of options ('- optim.lr: 1e-3'), got {got}")
    entries: list[dict[str, Given]] = []
    for node in root.items:
        if node.kind != "mapping":
            raise UserError(f"{path}:{node.line}: expected options as 'key: value', got a {node.kind}")
        entries.append({})
        _collect(node, "", path, entries[-1])
    return entries


def _read_file(path: Path) -> Node | None:
    """The tree of a YAML file; None for an empty one."""
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a folder, expected a YAML file")
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is not a file, expected a YAML file")
        with path.open("rb") as file:
            return read_tree(file.read(MOST_BYTES + 1))
    except FileNotFoundError:
        siblings = [other.name for other in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such config file.{nearest(path.name, siblings)}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except YAMLProblem as problem:
        raise UserError(f"{path}{f':{problem.line}' if problem.line else ''}: {problem}") from None


def _collect(root: Node, group: str, path: Path, given: dict[str, Given]) -> None:
    """Flatten a YAML mapping into `given`. A key that stands twice would silently lose its first value, so it is an
    error."""
    seen = set()
    for name, value in root.pairs:
        where = f"{path}:{name.line}"
        if name.kind != "scalar":
            raise UserError(f"{where}: expected a key, got a {name.kind}")
        key = join(group, name.text)
        if key in seen or key in given:
            raise UserError(f"{where}: key '{short(key)}' stands twice")
        seen.add(key)
        if value.kind == "mapping" and value.items:
            _collect(value, key, path, given)
        else:
            given[key] = Given(plain(value), f"{where}: {short(key)}", f"{where}: unknown key '{short(key)}'.")
