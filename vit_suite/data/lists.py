"""Lists of images with or without labels: text lines, or a CSV with named columns."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from vit_suite.data.decode import is_image
from vit_suite.data.listing import say_once
from vit_suite.errors import UserError, counted, short
from vit_suite.files import printable

FILES = ("filename", "file_name", "filepath", "file_path", "path", "image_path", "file", "image", "img", "image_name")
LABELS = ("label", "class", "species", "category", "target", "class_name", "label_name", "y", "id", "class_id")
"""Names of the columns of paths and of labels, the first that occurs counts; upper and lower case are equal. In a file
of two columns, the one that holds no paths is the label, whatever its name."""

LONGEST_PATH = 4096
"""Characters of a path on Linux."""
Rows = tuple[list[str], list[str | None]]
"""(paths, labels as words or None)."""


def read_list(file: Path) -> Rows:
    """The images that a list names, each once. UserError when it is no text in UTF-8, or names none.

    An image that is named again would count twice, or lie in both parts of a `data.holdout`: its first line counts, and
    how many lines are left out is said.
    """
    if file.exists() and not file.is_file():  # opening a pipe would wait for a writer
        raise UserError(f"the list '{file}' is no regular file.")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"'{file}' is not a readable UTF-8 list of paths ({type(error).__name__}).") from None
    paths, words = _read_csv(file, text) if _is_table(file, text) else _read_lines(text)
    if not paths:
        raise UserError(
            f"the list '{file}' names no images: expected lines of `path` or `path<TAB>label`, or a .csv whose first"
            " line names its columns, such as filename,label."
        )
    if too_long := [path for path in paths if len(path) > LONGEST_PATH]:
        raise UserError(
            f"'{file}' names a path of {len(too_long[0]):,} characters, {short(printable(too_long[0]))}; at most"
            f" {LONGEST_PATH:,} are possible."
        )
    if any("\0" in path for path in paths):
        raise UserError(f"'{file}' names a path with a zero byte, which no file has: is it a text file?")
    first = dict(zip(reversed(paths), range(len(paths) - 1, -1, -1), strict=True))
    if len(first) == len(paths):
        return paths, words
    again = [row for row, path in enumerate(paths) if first[path] != row]
    other = sum(words[row] != words[first[paths[row]]] for row in again)
    say_once(
        f"'{file}': {counted(len(again), 'line')} left out, whose image an earlier line names"
        f" ({printable(paths[again[0]])})" + (f"; {other} of them with another label" if other else "")
    )
    rows = sorted(first.values())
    return [paths[row] for row in rows], [words[row] for row in rows]


def _is_table(file: Path, text: str) -> bool:
    """Whether a list has columns: by its ending, or because its first line names them."""
    cells = [cell.strip().lower() for cell in re.split("[,;\t]", text.split("\n", 1)[0])]
    return file.suffix.lower() in (".csv", ".tsv") or (len(cells) > 1 and any(cell in FILES for cell in cells))


def _read_lines(text: str) -> Rows:
    paths: list[str] = []
    words: list[str | None] = []
    for line in text.split("\n"):  # not splitlines, which also breaks at characters that names may hold
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        word: str | None
        if "\t" in line:
            path, word = line.rsplit("\t", 1)
        elif is_image(line) or not re.search(r"\s", line):  # ends like an image: a path, spaces and all
            path, word = line, None
        else:
            path, word = line.rsplit(None, 1)
        paths.append(path.strip())
        words.append(word)
    return paths, words


def _read_csv(file: Path, text: str) -> Rows:
    """The rows of a CSV. Its first line names the columns; a file without such a line has `path` or `path,label`."""
    first = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=first.count)
    try:
        table = [row for row in csv.reader(text.split("\n"), delimiter=delimiter) if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise UserError(f"'{file}' is no CSV that can be read ({error}): is a quotation mark left open?") from None
    if not table:
        return [], []
    header = [cell.strip() for cell in table[0]]
    if any(is_image(cell) for cell in header):  # no names: the first line is an image already
        columns, rows = (0, 1 if len(header) > 1 else None), table
    else:
        columns, rows = _columns(header, file), table[1:]
    place, label = columns
    lacking = [row for row in rows if len(row) <= place]
    if lacking:
        raise UserError(
            f"'{file}': the line '{delimiter.join(lacking[0])[:80]}' has no column {short(header[place])!r}."
        )
    words = [row[label].strip() or None if label is not None and label < len(row) else None for row in rows]
    return [row[place].strip() for row in rows], words


def _columns(header: Sequence[str], file: Path) -> tuple[int, int | None]:
    """(number of the column of paths, number of the column of labels or None). UserError, with the names of the
    columns, when they do not tell."""
    names = [name.lower() for name in header]
    shown = short(", ".join(header[:8]))
    place = next((names.index(name) for name in FILES if name in names), None)
    if place is None:
        raise UserError(
            f"'{file}' has the columns {shown}: name the one that holds paths filename, and the one of"
            " the classes label."
        )
    others = [number for number in range(len(names)) if number != place]
    if len(others) <= 1:
        return place, others[0] if others else None
    label = next((names.index(name) for name in LABELS if name in names and names.index(name) != place), None)
    if label is None:
        raise UserError(f"'{file}' has the columns {shown}: name the one of the classes label.")
    return place, label
