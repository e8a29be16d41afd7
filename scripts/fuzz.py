"""Feed wrong values to everything a stranger can write: options, YAML, weights' metadata, shards, masks and boxes; and
start trainings with values that the schema allows.

    python scripts/fuzz.py --cases 3000            # the kinds in turn
    python scripts/fuzz.py --cases 300 --kind options --seed 7

A case is right when it is accepted, or refused by one UserError of at most 400 characters. Everything else is listed:

    traceback   another exception, which a user would see as "error: TypeError ..."
    nonsense    accepted, though no number, path or list can look like this, or it does not survive a round trip
    leftover    a refused case left a file behind
    hang        it took longer than 10 s
    long        the message has more than 400 characters or a line break

Exit status: 0 when nothing is listed, else 1. The same seed draws the same cases.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import logging
import os
import random
import signal
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

from vit_suite import cli
from vit_suite.config import METHODS
from vit_suite.errors import UserError
from vit_suite.options import REQUIRED, Option, Schema
from vit_suite.parsing import dump_config, load_config
from vit_suite.places import check_places

LIMIT = 10
"""Seconds after which a case counts as a hang."""
LONGEST = 400
"""Characters of a message, the paths of the case left out."""

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


class Finding(NamedTuple):
    kind: str
    case: str
    said: str


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


# -- Weights -----------------------------------------------------------------------------------------------------------

HOSTILE: list[Any] = [
    None,
    -1,
    0,
    1,
    3,
    10_000,
    10**9,
    10**30,
    0.5,
    -2.5,
    1e9,
    "vit",
    "",
    "x" * 1000,
    [],
    [0],
    [8, 8, 8],
    {},
    {"a": 1},
    True,
    [10**9] * 2,
    [[]],
]


def weight_cases(rng: random.Random, folder: Path) -> Iterator[Case]:
    """Our own safetensors file with one entry of its description changed, or some of its bytes."""
    import torch

    from vit_suite.config import BackboneConfig
    from vit_suite.models.backbone import Backbone
    from vit_suite.weights.checkpoint import save_backbone

    torch.manual_seed(0)
    kept = folder / "kept"
    made = BackboneConfig(patch_size=8, dim=24, depth=2, heads=3, registers=1, image_size=[16, 16])
    save_backbone(Backbone(made), kept, [0.5] * 3, [0.2] * 3)
    whole = (kept / "backbone.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    description = json.loads(header["__metadata__"]["vit_suite"])
    shape = ("dim", "depth", "patch_size", "channels", "registers", "mlp_ratio", "positions", "image_size")
    while True:
        if rng.random() < 0.7:
            changed = json.loads(json.dumps(description))
            name = rng.choice(list(changed) + [f"backbone.{key}" for key in changed["backbone"]] * 2)
            value = rng.choice(HOSTILE)
            inside = changed["backbone"] if name.startswith("backbone.") else changed
            before = inside[name.rpartition(".")[2]]
            inside[name.rpartition(".")[2]] = value
            new = header | {"__metadata__": {"vit_suite": json.dumps(changed)}}
            text = json.dumps(new).encode()
            content = len(text).to_bytes(8, "little") + text + whole[8 + length :]
            odd = name.startswith("backbone.") and name.rpartition(".")[2] in shape and value not in (before, None)
            if name == "backbone.heads":  # how many there are is not in the tensors, if they can be
                odd = value is not None and (type(value) is not int or value < 1 or made.dim % value > 0)
            text = f"weights {name}={value!r:.60}"
        else:
            content, odd = damaged(rng, whole), False
            text = f"weights of {len(whole)} bytes damaged at random"
        yield Case(text, lambda content=content, odd=odd: try_weights(folder / "case.safetensors", content, odd))


def damaged(rng: random.Random, whole: bytes) -> bytes:
    """The bytes cut short, or with up to 16 of them changed, most at the beginning where the structure is."""
    content = bytearray(whole)
    if rng.random() < 0.3:
        return bytes(content[: rng.randrange(len(content))])
    for _ in range(rng.randrange(1, 16)):
        content[min(int(rng.expovariate(1 / 400)), len(content) - 1)] = rng.randrange(256)
    return bytes(content)


def try_weights(path: Path, content: bytes, odd: bool) -> str | None:
    from vit_suite.weights.checkpoint import load_backbone

    path.write_bytes(content)
    load_backbone(path)
    return "it does not fit the tensors" if odd else None


# -- Shards, masks and boxes -------------------------------------------------------------------------------------------


def picture(side: int = 8) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(file, "PNG")
    return file.getvalue()


LABELS = [
    b"0",
    b"1",
    b"-1",
    b"5000000000",
    b"9" * 30,
    b"9" * 5000,
    b"0.0",
    b"1.5",
    b"",
    b" ",
    b"nan",
    b"\xff\xfe",
    b"a\nb",
    b'{"label": 1}',
    b"[" * 3000,
    b"{" * 3000,
    b'{"label": ' + b"9" * 400 + b"}",
    b"null",
    b"\0",
    b"<script>",
]
NAMES = [
    "a.png",
    "a.b.png",
    "A.PNG",
    "a",
    ".png",
    "d/a.png",
    "../a.png",
    "/a.png",
    "a\nb.png",
    "a.cls.png",
    "\u00e4.png",
    "x" * 90 + ".png",
]


def shard_cases(rng: random.Random, folder: Path) -> Iterator[Case]:
    """A tar of a few pictures with odd labels, names or bytes; each case in a folder of its own."""
    import vit_suite.data.registry  # noqa: F401 (here, so that no case pays for importing torch)

    for number in range(10**9):
        members = []
        for _ in range(rng.randrange(1, 4)):
            name = rng.choice(NAMES)
            stem = name[: -len(".png")] if name.lower().endswith(".png") else name
            members += [(name, picture()), (f"{stem}.{rng.choice(['cls', 'json', 'txt', 'cls'])}", rng.choice(LABELS))]
        cut = rng.random() if rng.random() < 0.2 else 1.0
        index = rng.choice([None] * 5 + [b"", b"PK\x03\x04", b"\x93NUMPY", os.urandom(64)])
        shown = ", ".join(f"{name[:12]!r}: {content[:16]!r}" for name, content in members[1::2])
        place = folder / f"shards{number % 50}-{number}"
        yield Case(
            f"shard {shown}, cut to {cut:.0%}, index {index!r:.20}",
            lambda members=members, cut=cut, index=index, place=place: try_shard(place, members, cut, index),
        )


def try_shard(place: Path, members: list[tuple[str, bytes]], cut: float, index: bytes | None) -> str | None:
    from vit_suite.config import DataConfig
    from vit_suite.data.registry import open_train
    from vit_suite.data.shard_index import INDEX

    place.mkdir()
    path = place / "train-0.tar"
    with tarfile.open(path, "w") as file:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    if cut < 1:
        os.truncate(path, int(path.stat().st_size * cut))
    if index is not None:
        (place / INDEX).write_bytes(index)
    source = open_train(DataConfig(name="shards", root=str(place)), 0)
    if source.labels is not None and int(source.labels.max()) >= max(2, len(source)) * 1000:
        return f"a label of {int(source.labels.max())} among {len(source)} images"
    source.load(0)
    return None


NUMBERS: list[Any] = [0, 1, 5, -3, 8, 1e9, 10**30, 0.5, None, "7", "", [], {}, True]
JUNK = [b"", b"{", b"[" * 3000, b"\xff" * 20, b"null", b"[]", b"{}", b"\xef\xbb\xbf[]", b"<a><b></a>"]


def truth_cases(rng: random.Random, folder: Path) -> Iterator[Case]:
    """Boxes as COCO, VOC or text, and masks, with odd numbers, names or bytes, beside two images of 8 x 8 pixels."""
    import vit_suite.data.truth  # noqa: F401 (here, so that no case pays for importing torch)

    images = folder / "images"
    images.mkdir()
    for name in ("a.png", "b.png"):
        (images / name).write_bytes(picture())
    for number in range(10**9):
        place = folder / f"truth{number}"
        box = [rng.choice(NUMBERS) for _ in range(rng.choice([4, 4, 4, 3, 5, 0]))]
        kind = rng.choice(["coco", "voc", "text", "mask", "npy"])
        files: dict[str, bytes] = {}
        if kind == "coco":
            odd = rng.choice(NUMBERS)
            entry = {"images": [{"id": 1, "file_name": rng.choice(["a.png", "c.png", 3, None])}, {"id": odd}]}
            entry["annotations"] = [{"image_id": rng.choice([1, 1, 2, odd]), "bbox": box}, rng.choice(NUMBERS)]
            files["boxes.json"] = json.dumps(entry).encode()
        elif kind == "voc":
            values = "".join(
                f"<{tag}>{value}</{tag}>" for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=False)
            )
            files["a.xml"] = f"<annotation><object><bndbox>{values}</bndbox></object></annotation>".encode()
        elif kind == "text":
            files["boxes.txt"] = f"a.png {' '.join(map(str, box))}\nb.png 0 0 4 4\n".encode()
        elif kind == "mask":
            files["a.png"] = damaged(rng, picture(rng.choice([8, 8, 4])))
        else:
            files["a.npy"] = damaged(
                rng,
                b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', 'fortran_order': False, 'shape': (8, 8), }"
                + b" " * 58
                + b"\n"
                + bytes(64),
            )
        if rng.random() < 0.2:
            files = {name: rng.choice(JUNK) for name in files}
        shown = "; ".join(f"{name}: {content[:60]!r}" for name, content in files.items())
        yield Case(f"truth {shown}", lambda place=place, files=files: try_truth(images, place, files))


def try_truth(images: Path, place: Path, files: dict[str, bytes]) -> str | None:
    from vit_suite.data.decode import DecodeError
    from vit_suite.data.truth import open_truths

    place.mkdir()
    for name, content in files.items():
        (place / name).write_bytes(content)
    only = next(iter(files))
    target = place / only if only.startswith("boxes.") else place
    source, truths = open_truths(images, target)
    for index in range(len(source)):
        try:
            found = truths.load(index)
        except DecodeError:  # one mask that is listed; the command goes on
            continue
        if truths.kind == "boxes" and not found.isfinite().all():
            return "a box that is not finite"
    return None


KINDS: dict[str, Callable[[random.Random, Path], Iterator[Case]]] = {
    "options": option_cases,
    "start": start_cases,
    "weights": weight_cases,
    "shards": shard_cases,
    "truth": truth_cases,
}

SHARE = {"options": 2, "start": 15, "weights": 6, "shards": 6, "truth": 6}
"""The cases divided by this number are of a kind: half are options, and starts come on top."""


# -- Running -----------------------------------------------------------------------------------------------------------


class TooLong(BaseException):
    """A case that went beyond its time."""


def judge(case: Case, folder: Path) -> tuple[str, Finding | None]:
    """("accepted" or "refused", what is wrong with that)."""

    def ring(*_: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(LIMIT)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            wrong = case.run()
        return "accepted", Finding("nonsense", case.text, wrong) if wrong else None
    except UserError as error:
        said = str(error).replace(str(folder), "")
        kind = "long" if len(said) > LONGEST else None
        return "refused", Finding(kind, case.text, said[:200]) if kind else None
    except TooLong:
        return "refused", Finding("hang", case.text, f"more than {LIMIT} s")
    except Exception as error:
        return "refused", Finding("traceback", case.text, f"{type(error).__name__}: {error!s:.200}")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(kind: str, cases: int, seed: int) -> tuple[collections.Counter, list[Finding]]:
    """Try `cases` cases of a kind; counts of accepted and refused, and what is wrong."""
    rng, counts, findings = random.Random(f"{kind} {seed}"), collections.Counter(), []
    for logger in ("vit_suite", "pytorch_lightning", "pytorch_lightning.utilities.rank_zero", "lightning_fabric"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    here = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="vit-suite-fuzz-") as name:
        folder, empty = Path(name) / "files", Path(name) / "empty"
        folder.mkdir()
        empty.mkdir()
        os.chdir(empty)  # where a relative output would land
        try:
            for _, case in zip(range(cases), KINDS[kind](rng, folder), strict=False):
                answer, finding = judge(case, folder)
                counts[answer] += 1
                if finding:
                    findings.append(finding)
                for left in empty.iterdir():
                    findings.append(Finding("leftover", case.text, left.name))
                    left.rename(Path(name) / f"left{len(findings)}")
        finally:
            os.chdir(here)
    return counts, findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--kind", choices=list(KINDS), action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=40, help="findings listed of each kind")
    arguments = parser.parse_args()
    chosen = arguments.kind or list(KINDS)
    total: collections.Counter = collections.Counter()
    for kind in chosen:
        share = arguments.cases if len(chosen) == 1 else arguments.cases // SHARE[kind]
        started = time.perf_counter()
        counts, findings = fuzz(kind, share, arguments.seed)
        kinds = collections.Counter(finding.kind for finding in findings)
        listed = ", ".join(f"{count} {name}" for name, count in kinds.items()) or "nothing wrong"
        print(
            f"{kind:<8} {share:5d} cases: {counts['accepted']} accepted, {counts['refused']} refused;"
            f" {listed}; {time.perf_counter() - started:.0f} s",
            flush=True,
        )
        for finding in findings[: arguments.show]:
            print(f"  {finding.kind}: {finding.case!r:.160} -> {finding.said!r:.200}")
        total += kinds
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
