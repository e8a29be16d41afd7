"""Cases of scripts/fuzz.py about files: weights with hostile metadata, shards, masks and boxes, lists."""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fuzz_options import Case

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


# -- Lists -------------------------------------------------------------------------------------------------------------

HEADERS = ["filename,label", "label;filename", "image\tclass", "filename", "x,y,z", "filename|label", "", "a.png,cat"]
CELLS = ["a.png", "b.png", "gone.png", ".", "..", "/dev/zero", "", " ", "\0", '"', '"a.png', "a\u2028b.png",
         "\udcff.png", "cat", "1", "-1", "nan", "9" * 400, "x" * 5000, "#", "{}"]  # fmt: skip


def list_cases(rng: random.Random, folder: Path) -> Iterator[Case]:
    """Tables and text lists with odd rows, quotations that do not end and other encodings, beside two images."""
    import vit_suite.data.registry  # noqa: F401 (here, so that no case pays for importing torch)

    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(picture())
    while True:
        rows = [[rng.choice(CELLS) for _ in range(rng.choice([1, 2, 2, 2, 3]))] for _ in range(rng.randrange(0, 6))]
        delimiter = rng.choice(",,;\t| ")
        text = "\n".join([rng.choice(HEADERS), *(delimiter.join(row) for row in rows)])
        if rng.random() < 0.1:
            text += '\n"' + "y,x\n" * 50_000
        encoding = rng.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16"])
        content = text.replace("\n", rng.choice(["\n", "\r\n", "\r"])).encode(encoding, "surrogatepass")
        ending = rng.choice(["csv", "csv", "tsv", "txt"])
        yield Case(
            f"list .{ending} {encoding} {text[:90]!r}",
            lambda content=content, ending=ending: try_list(folder / f"list.{ending}", content),
        )


def try_list(path: Path, content: bytes) -> str | None:
    from vit_suite.config import DataConfig
    from vit_suite.data.decode import DecodeError
    from vit_suite.data.registry import open_train

    path.write_bytes(content)
    source = open_train(DataConfig(name="list", root=str(path)), 0)
    paths = [source.path(index) for index in range(len(source))]
    if len(set(paths)) < len(paths):
        return "an image twice"
    if source.labels is not None and int(source.labels.max()) >= len(source.classes):
        return "a label without a class"
    for index in range(len(source)):
        try:
            source.load(index)
        except DecodeError:  # one file that is listed; the command goes on
            continue
    return None
