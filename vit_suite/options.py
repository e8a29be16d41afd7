"""What a config dataclass allows: its options by dotted key, their types, limits, defaults and docstrings, and the key
nearest to a wrong one.

Only the standard library is used, so that help answers at once. Converting a value takes 60 lines here. Importing
jsonargparse for it took half of the time of a command's start, pydantic a little less.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import os
import re
import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from vit_suite.config.limits import Place, Range
from vit_suite.errors import UserError, short
from vit_suite.yaml_tree import plain, read_tree

T = TypeVar("T")

REQUIRED = dataclasses.MISSING

ALIKE = 0.65
"""Likeness from which on a known key is suggested for a wrong one; 1 is equality."""
SHOWN = 14
"""Names that a message about an unknown one lists."""


class Option(NamedTuple):
    """A leaf of the configuration."""

    key: str
    hint: Any  # its type, without limits
    limits: tuple[Range, ...]
    default: Any  # or REQUIRED
    place: Place | None = None  # what it names on the disk

    @property
    def item_hint(self) -> Any:
        """The type of a list's items; None when the option is no list."""
        lists = (hint for hint in (self.hint, *get_args(self.hint)) if get_origin(hint) is list)
        return next((get_args(hint)[0] for hint in lists), None)

    @property
    def is_list(self) -> bool:
        """Whether the option takes several values."""
        return self.item_hint is not None

    @property
    def is_switch(self) -> bool:
        """Whether the bare `--option` means true."""
        return bool in (self.hint, *get_args(self.hint))

    @property
    def choices(self) -> list[str]:
        """The words that the option, or an item of its list, may be."""
        return _choices(self.hint)

    @property
    def words(self) -> list[str]:
        """The words that may stand in place of a list: `auto` of `list of float or one of auto, minmax`."""
        inner = () if get_origin(self.hint) is list else get_args(self.hint)
        return [str(word) for hint in inner if get_origin(hint) is Literal for word in get_args(hint)]

    @property
    def type_name(self) -> str:
        """The type in words, with its limits: `int (at least 1)`, `one of cpu, gpu`, `list of float (2 of them, 0 to
        1)`."""
        return self._type_name()

    def expected(self, wrong: Any) -> str:
        """`type_name` for the message about a wrong value or list item. If the value is too large a number, the largest
        allowed one is named too."""
        if self.is_list and wrong in ([], ()):
            return f"at least one {_spell(self.item_hint)}".replace("one one", "one")
        return self._type_name(ceiling=any(_exceeds(wrong, limit.ceiling) for limit in self.limits))

    def _type_name(self, ceiling: bool = False) -> str:
        limits = ", ".join(dict.fromkeys(limit.words(ceiling) for limit in self.limits))
        name = "path" if self.place else _spell(self.hint)
        return f"{name} ({limits})" if limits else name

    def convert(self, value: Any) -> Any:
        """`value` (text, None, a list of text, or a Python object) in the type of the option; ValueError where it does
        not fit."""
        value = convert(self.hint, value)
        if self.place and value is not None:
            value = [_path(item) for item in value] if isinstance(value, list) else _path(value)
        decimals = [n for n in (value if isinstance(value, list) else [value]) if isinstance(n, float)]
        if not all(map(math.isfinite, decimals)) or not all(limit.holds(value) for limit in self.limits):
            raise ValueError(value)
        return value

    def culprit(self, value: Any) -> Any:
        """The part of a wrong value that a message shows: of a list, the first item that is wrong by itself."""
        if self.is_list:
            try:
                value = _items(value)
            except ValueError:
                return value
            limits = tuple(limit for limit in self.limits if limit.length is None)
            for item in value:
                try:
                    self._replace(hint=self.item_hint, limits=limits).convert(item)
                except ValueError:
                    return item
        return value


class Schema:
    """The options and groups of a config class. `chosen` maps `method.name` to the method whose options the group
    has.

    A class of options may list in SYNONYMS what other programs (timm, Lightning, the authors' code) call its options,
    where spelling alone would not find them: {"embed_dim": "dim"}. In WITHOUT it may say why it lacks an option that
    another class of its group has: {"crops_at_once": "masked autoencoders have one view."}.
    """

    def __init__(self, cls: type, chosen: Mapping[str, Any] = types.MappingProxyType({})):
        self.groups: dict[str, type] = {}  # "" is the config itself
        self.options: dict[str, Option] = {}
        self.selectors: list[str] = []  # the options that choose the class of their group
        self.synonyms: dict[str, str] = {}  # last word of another program's option -> our key
        self._add("", cls, None, chosen)

    def _add(self, group: str, cls: type, template: Any, chosen: Mapping[str, Any]) -> None:
        """`template` carries the defaults of a group where its parent gives others than its class does."""
        self.groups[group] = cls
        for base in reversed(cls.__mro__):
            self.synonyms |= {word: join(group, name) for word, name in vars(base).get("SYNONYMS", {}).items()}
        hints, limited = get_type_hints(cls), get_type_hints(cls, include_extras=True)
        # Options of a base class that come by keyword alone stand behind the class's own.
        for field in sorted(dataclasses.fields(cls), key=lambda field: bool(field.kw_only)):
            key, hint = join(group, field.name), hints[field.name]
            default = _default(field) if template is None else getattr(template, field.name)
            if variants := field.metadata.get("variants"):
                # An unknown name keeps the default class here. Its conversion fails later, with the valid names.
                selector = field.metadata.get("selector", own := f"{key}.name")
                word = chosen.get(selector)
                variant = variants.get(word, type(default)) if isinstance(word, str) else type(default)
                self._add(key, variant, default if variant is type(default) else None, chosen)
                if selector == own:  # else the group follows the choice of another one
                    self.options[selector] = self.options[selector]._replace(hint=Literal[tuple(variants)])
                    self.selectors.append(selector)
            elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
                self._add(key, hint, None if default is REQUIRED else default, chosen)
            else:
                self.options[key] = Option(
                    key,
                    hint,
                    tuple(_extras(limited[field.name], Range)),
                    default,
                    next(_extras(limited[field.name], Place), None),
                )

    def build(self, values: Mapping[str, Any], group: str = "") -> Any:
        """The config object from a value for every option. UserError where a class finds that its values contradict
        each other: its method `problem` returns a sentence that begins with the name of an option, or None."""
        keys = {field.name: join(group, field.name) for field in dataclasses.fields(self.groups[group])}
        config = self.groups[group](
            **{name: self.build(values, key) if key in self.groups else values[key] for name, key in keys.items()}
        )
        if problem := getattr(config, "problem", lambda: None)():
            raise UserError(join(group, problem))
        return config

    def suggest(self, key: str, prefix: str = "") -> str:
        """`" Did you mean 'optim.lr'?"` for the option closest to a wrong key; the groups there are when none is
        close."""
        from difflib import SequenceMatcher

        group, _, name = key.rpartition(".")
        if reason := getattr(self.groups.get(group), "WITHOUT", {}).get(name):
            return f" {reason}"
        key = short(key)  # comparing takes time in proportion to the length

        def likeness(known: str) -> float:
            """The last word counts most: it may stand in the wrong group, and many options share a group."""
            parts = zip(key.rpartition(".")[::2], known.rpartition(".")[::2], strict=True)
            group, leaf = (SequenceMatcher(None, a, b).ratio() for a, b in parts)
            return 0.2 * group + 0.8 * leaf

        best = self.synonyms.get(key.rpartition(".")[2])
        if best not in self.options:
            best = max(self.options, key=likeness, default=None)
            if best is None or likeness(best) < ALIKE:
                known = list(dict.fromkeys(prefix + option.partition(".")[0] for option in self.options))
                more = f" ... ({len(known)} in all)" if len(known) > SHOWN else ""
                return f" Known: {', '.join(known[:SHOWN])}{more}."
        return f" Did you mean '{prefix}{best}'?"


def join(group: str, name: str) -> str:
    """`optim`, `lr` -> `optim.lr`; the group of the config itself is empty."""
    return f"{group}.{name}" if group else name


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _extras(hint: Any, kind: type[T]) -> Iterator[T]:
    """Every Range, or Place, in an annotation, however deep: `list[Annotated[float, Range(0, 1)]] | None`."""
    yield from (extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, kind))
    for inner in get_args(hint):
        yield from _extras(inner, kind)


def _path(text: str) -> str:
    """`~/runs` -> `/home/ada/runs`, `~ada/runs` too. ValueError for what cannot be a path."""
    if not text.strip() or "\0" in text:
        raise ValueError(text)
    return os.path.expanduser(text)


def _exceeds(value: Any, ceiling: float) -> bool:
    """Whether a value, written or not, is a number above `ceiling`."""
    if isinstance(value, str) and (WHOLE_NUMBER.fullmatch(value) or DECIMAL_NUMBER.fullmatch(value)):
        value = float(value)
    return isinstance(value, (int, float)) and value > ceiling


WHOLE_NUMBER = re.compile(r"[+-]?[0-9]+(_[0-9]+)*")
DECIMAL_NUMBER = re.compile(r"[+-]?([0-9]+(_[0-9]+)*\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
MOST_DIGITS = 400
"""Longest text that is read as a number. Python itself stops at 4,300 digits, and the largest float has 309."""
SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
"""The truth values of YAML 1.1 and 1.2."""


def convert(hint: Any, value: Any) -> Any:
    """`value` (text, None, a list of text, or a Python object) as an object of the type `hint`.

    Types: int, float, bool, str, None, Literal, list of these, and unions, whose members are tried in order. Numbers
    are written in ASCII digits with a decimal point: `1e-3`, `1_000`. Raises ValueError when the value does not fit.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return convert(inner[0], value)
    if origin in (Union, types.UnionType):
        return _convert_union(inner, value)
    if origin is Literal:
        for choice in inner:
            if value in (choice, str(choice)):
                return choice
        raise ValueError(value)
    if origin is list:
        if not (items := _items(value)):
            raise ValueError(value)
        return [convert(inner[0], item) for item in items]
    return _convert_scalar(hint, value)


def _convert_union(members: tuple[Any, ...], value: Any) -> Any:
    if type(None) in members and (value is None or value == "null"):
        return None
    kinds = {get_origin(_bare(member)) is list for member in members if member is not type(None)}
    if len(kinds) == 2 and isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]  # the command line gives a list of one item where an option may be a list or a number
    for member in members:
        if member is not type(None):
            try:
                return convert(member, value)
            except ValueError:
                continue
    raise ValueError(value)


def _bare(hint: Any) -> Any:
    """A type without its limits."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _items(value: Any) -> list[Any]:
    """The items of a list; text counts as one when it is written in brackets: `[0.9, 0.999]`."""
    if isinstance(value, str) and value.startswith("["):
        node = read_tree(value)  # YAMLProblem is a ValueError
        if node is None or node.kind != "sequence":
            raise ValueError(value)
        return plain(node)
    if isinstance(value, (list, tuple)):
        return list(value)
    raise ValueError(value)


def _convert_scalar(hint: Any, value: Any) -> Any:
    if hint is str and isinstance(value, str):
        return value
    if hint is bool:
        if isinstance(value, str) and value.strip().lower() in SWITCHES:
            return SWITCHES[value.strip().lower()]
        if isinstance(value, bool):
            return value
    elif hint in (int, float) and not isinstance(value, bool):
        if isinstance(value, str):
            text, pattern = value.strip(), WHOLE_NUMBER if hint is int else DECIMAL_NUMBER
            if len(text) <= MOST_DIGITS and pattern.fullmatch(text):
                return hint(text)
        elif isinstance(value, numbers.Integral if hint is int else numbers.Real):
            try:
                return hint(value)
            except OverflowError:  # an int of 309 digits as float
                pass
    raise ValueError(value)


def _choices(hint: Any) -> list[str]:
    if get_origin(hint) is Literal:
        return [str(choice) for choice in get_args(hint)]
    return [choice for inner in get_args(hint) for choice in _choices(inner)]


def _spell(hint: Any) -> str:
    origin, inner = get_origin(hint), [arg for arg in get_args(hint) if arg is not type(None)]
    if origin is Literal:
        return ("one of " if len(inner) > 1 else "") + ", ".join(map(str, inner))
    if origin in (Union, types.UnionType):
        return " or ".join(map(_spell, inner))
    if origin is list:
        return f"list of {_spell(inner[0])}".replace("list of one of", "any of")
    return "true or false" if hint is bool else getattr(hint, "__name__", str(hint))


def attribute_docs(cls: type) -> dict[str, str]:
    """The string below each field of a dataclass, its bases included. Python keeps it in the source only."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        docs |= _module_docs(base.__module__).get(base.__name__, {})
    return docs


@functools.cache
def _module_docs(module: str) -> dict[str, dict[str, str]]:
    """Class -> field -> docstring. A module is read once, because inspect.getsource(cls) parses the whole file for each
    of its classes."""
    import ast
    import inspect
    import itertools
    import sys

    docs: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(sys.modules[module])).body:
        if isinstance(node, ast.ClassDef):
            docs[node.name] = {
                field.target.id: " ".join(text.value.value.split())
                for field, text in itertools.pairwise(node.body)
                if isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            }
    return docs
