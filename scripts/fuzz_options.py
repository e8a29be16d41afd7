"""Cases of scripts/fuzz.py about options: wrong values of every option, in YAML, on the command line and from Python;
and trainings that start with values that the schema allows."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

from vit_suite import cli
from vit_suite.config import METHODS
from vit_suite.errors import UserError
from vit_suite.options import REQUIRED, Option, Schema
from vit_suite.parsing import dump_config, load_config
from vit_suite.places import check_places

NO_NUMBER = ["nan", "inf", "-inf", "1e400", "1,5", "\u0661\u0662", "\u00bd", "0x10", "1e", "--1", "five", "1 2", "1__0"]
"""No number that an option takes; a text option may hold it."""
WORDS = NO_NUMBER + [
    "",
    " ",
    "0",
    "-1",
    "1",
    "0.5",
    "1.0",
    "-0.0",
    "1e-300",
    "1e300",
    "2147483648",
    "4294967296",
    "9223372036854775808",
    "9" * 30,
    "9" * 5000,
    "true",
    "null",
    "~",
    "[]",
    "[1]",
    "[[1]]",
    "[" * 500,
    "{}",
    "{a: 1}",
    "!!python/name:os.system",
    "x" * 300,
    "x" * 10_000,
    "a\nb",
    "a\0b",
    "\udcff",
    "\U0001f600",
    "../..",
    "/",
    "/dev/null",
    "/proc/1/mem",
    "~nobody-of-this-name/x",
    "%s%n",
    "$(reboot)",
    "auto",
    "cpu",
]
OBJECTS: list[Any] = [
    None,
    True,
    0,
    -1,
    2**70,
    10**400,
    0.0,
    float("nan"),
    float("inf"),
    b"x",
    [],
    [[]],
    {},
    (),
    object(),
]
"""What Python callers may pass besides text."""


class Case(NamedTuple):
    """Something to try."""

    text: str
    """What is tried, for the list."""
    run: Callable[[], str | None]
    """Tries it; returns what is wrong about accepting it, or None."""
    strict: bool = True
    """Whether a traceback counts: other tools read the same bytes (Pillow, tarfile) and are given broken ones."""


# -- Options -----------------------------------------------------------------------------------------------------------


def commands() -> dict[str, type]:
    """Command -> the class of its options."""
    return {name: cli._load(command.config) for name, command in cli.COMMANDS.items()}


def option_cases(rng: random.Random, folder: Path) -> Iterator[Case]:
    """One option of one command with one value, by command line, YAML file or Python."""
    schemas = []
    for name, cls in commands().items():
        methods = METHODS if "method.name" in Schema(cls).options else [None]
        schemas += [(name, cls, method, Schema(cls, {"method.name": method})) for method in methods]
    while True:
        name, cls, method, schema = rng.choice(schemas)
        if not schema.options:
            continue
        option = rng.choice(list(schema.options.values()))
        way = rng.choice(["words", "yaml", "python", "text"])
        base = {key: "weights" for key, other in schema.options.items() if other.default is REQUIRED}
        if method and option.key != "method.name":
            base["method.name"] = method
        if way == "text":
            text = broken_yaml(rng, option)
            yield Case(f"{name} --config {text[:100]!r}", lambda cls=cls, text=text: read_text(cls, text, folder))
            continue
        value = rng.choice(OBJECTS) if way == "python" and rng.random() < 0.7 else draw_value(rng, option)
        shown = (
            f"{name} {method or ''} {option.key}={str(type(value))[8:-2]} {value!r:.60}"
            if not isinstance(value, int)
            else f"{name} {method or ''} {option.key}=int"
        )
        yield Case(
            f"{shown} ({way})",
            lambda cls=cls, base=base, option=option, value=value, way=way: try_option(
                cls, base, option, value, way, folder
            ),
        )


def draw_value(rng: random.Random, option: Option) -> Any:
    """A word, or several for a list; often near the option's own limits or default."""
    edges = [edge for limit in option.limits for edge in (limit.least, limit.most, limit.above, limit.ceiling)]
    pool = WORDS + [str(edge) for edge in edges] + [str(edge + step) for edge in edges for step in (-1, 1)]
    if option.choices:
        pool = pool + [choice.upper() for choice in option.choices] + option.choices * 3
    if option.is_list and rng.random() < 0.7:
        return [rng.choice(pool) for _ in range(rng.choice([0, 1, 2, 2, 4, 50]))]
    return rng.choice(pool)


def try_option(cls: type, base: dict, option: Option, value: Any, way: str, folder: Path) -> str | None:
    if way == "python":
        config = load_config(None, {**base, option.key: value}, cls)
    elif way == "words":
        words = [word for key, text in base.items() for word in (f"--{key}", text)]
        values = [str(item) for item in value] if isinstance(value, list) else [str(value)]
        config = load_config(None, [*words, f"--{option.key}", *values], cls)
        if any(text.startswith("--") for text in values):
            return None
    else:
        import yaml

        path = folder / "case.yaml"
        path.write_text(yaml.safe_dump({**base, option.key: value}, allow_unicode=True), errors="surrogateescape")
        config = load_config(path, cls=cls)
    got = config
    for part in option.key.split("."):
        got = getattr(got, part)
    return wrong_about(option, value, got) or round_trip(config, cls, folder) or places(config)


def wrong_about(option: Option, value: Any, got: Any) -> str | None:
    """What cannot be right about a value that was accepted, judged apart from the code that accepted it."""
    kinds = {option.hint, option.item_hint, *get_args(option.hint)}
    given = [str(item) for item in (value if isinstance(value, (list, tuple)) else [value])]
    if kinds & {int, float} and str not in kinds and any(text in NO_NUMBER for text in given):
        return f"a number from {given}"
    numbers = [n for n in (got if isinstance(got, list) else [got]) if type(n) in (int, float)]
    if any(n != n or n in (float("inf"), float("-inf")) for n in numbers):
        return "not finite"
    if any(type(n) is int and abs(n) > 2**32 for n in numbers):
        return f"larger than anything: {numbers}"
    if got == []:
        return "an empty list"
    if option.place and got is not None and any(not text.strip() or "\0" in text for text in as_list(got)):
        return "no path"
    return None


def as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def round_trip(config: Any, cls: type, folder: Path) -> str | None:
    """A config that was accepted is written to a run directory, and read from there."""
    path = folder / "dumped.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    return None if load_config(path, cls=cls) == config else "config.yaml reads back otherwise"


def places(config: Any) -> None:
    """The check of paths; its UserError is what most of these cases should end with."""
    check_places(config)


def broken_yaml(rng: random.Random, option: Option) -> str:
    """A YAML text that is damaged, deep, or uses what configs must not."""
    group, _, leaf = option.key.rpartition(".")
    text = f"{group or leaf}:\n  {leaf}: {rng.choice(WORDS)[:200]}\n"
    kind = rng.randrange(8)
    if kind == 0:
        return "{a: " * 1000 + "1" + "}" * 1000
    if kind == 1:
        return "\n".join(
            [f"a0: &a0 [{rng.choice(WORDS)[:20]!r}]"]
            + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
        )
    if kind == 2:
        return f"{option.key}: !!python/object/apply:os.system [id]\n"
    if kind == 3:
        return text * 2
    if kind == 4:
        return "".join(rng.choice("[]{}:,&*!|>-?'\"%@`# \n\tab1\u00e4") for _ in range(rng.randrange(60)))
    if kind == 5:
        return text[: rng.randrange(len(text))] + rng.choice("\0\x07\ufeff\u2028") + text
    if kind == 6:
        return f"? {'- ' * rng.randrange(1, 300)}x\n: 1\n"
    return f"{option.key}: &x\n  y: *x\n"


def read_text(cls: type, text: str, folder: Path) -> str | None:
    path = folder / "case.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    load_config(path, cls=cls)
    return "a tag" if "!!python" in text else None


# -- Starts ------------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "backbone.patch_size": 8,
    "backbone.dim": 24,
    "backbone.depth": 2,
    "backbone.heads": 3,
    "data.name": "shapes",
    "data.image_size": 32,
    "data.length": 64,
    "data.test_length": 40,
    "data.batch_size": 16,
    "views.global_size": 32,
    "trainer.max_epochs": 2,
    "trainer.progress": False,
    "trainer.accelerator": "cpu",
    "trainer.threads": 1,
    "run.report": False,
}
"""A training that a CPU prepares in a moment."""
LARGE = {"method.out_dim": 64, "method.hidden_dim": 32, "method.bottleneck_dim": 16, "method.decoder_dim": 32}
"""The same for options that some methods have."""
OF_THE_MACHINE = ("run.output", "run.overwrite", "start", "drill", "data.root", "data.download", "backbone.pretrained",
                  "backbone.name", "trainer.threads", "trainer.devices", "trainer.nodes", "logger.wandb")  # fmt: skip
"""Options that download, start processes, or name files."""
MOST = 512
"""Largest number that is tried: larger ones take memory, and are refused or not by the memory there is."""


def start_cases(rng: random.Random, folder: Path) -> Iterator[Case]:
    """A training with one option at a value that its type and limits allow: everything is built, nothing is trained."""
    import vit_suite.training.run  # noqa: F401 (here, so that no case pays for importing torch)
    from vit_suite.config import PretrainConfig

    schemas = {method: Schema(PretrainConfig, {"method.name": method}) for method in METHODS}
    for number in range(10**9):
        method, schema = rng.choice(list(schemas.items()))
        base = SMALL | {key: value for key, value in LARGE.items() if key in schema.options} | {"method.name": method}
        option = rng.choice([one for key, one in schema.options.items() if key not in (*OF_THE_MACHINE, "method.name")])
        value = allowed_value(rng, option)
        yield Case(
            f"start {method} {option.key}={value!r:.60}",
            lambda base=base, key=option.key, value=value, place=folder / f"run{number}": try_start(
                {**base, key: value}, place
            ),
        )


def allowed_value(rng: random.Random, option: Option) -> Any:
    """A choice, a switch, or a number (as many as a list takes) at or near a limit."""
    edges = [edge + step for limit in option.limits for edge in (limit.least, limit.most, limit.above, limit.below)
             for step in (-1, -0.5, 0, 1e-6, 0.5, 1)]  # fmt: skip
    pool: list[Any] = [edge for edge in edges if abs(edge) <= MOST] + [0, 1, 2, 3, 7, 8, 16, 33, 0.25, 1e-8, None]
    pool += option.choices * 4 + ([True, False] * 20 if option.is_switch else [])
    if not option.is_list:
        return rng.choice(pool)
    length = next((limit.length for limit in option.limits if limit.length), rng.randrange(1, 4))
    values = [rng.choice([item for item in pool if item is not None]) for _ in range(length)]
    return sorted(values, key=lambda item: (str(type(item)), item)) if rng.random() < 0.7 else values


def try_start(given: dict[str, Any], place: Path) -> str | None:
    from vit_suite.config import PretrainConfig
    from vit_suite.signals import Signals
    from vit_suite.training.run import prepare

    cfg = load_config(None, {**given, "run.output": str(place)}, PretrainConfig)
    try:
        with contextlib.ExitStack() as stack, Signals() as signals:
            prepare(cfg, None, signals, stack)
    except UserError:
        if place.exists():
            raise RuntimeError(f"a run directory is left: {sorted(path.name for path in place.iterdir())}") from None
        raise
    return None if (place / "config.yaml").is_file() else "no run directory"
