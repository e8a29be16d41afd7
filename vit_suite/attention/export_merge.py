"""What rank 0 does when all images are drawn: files about all pictures, the manifest, the list of failures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vit_suite import distributed
from vit_suite.attention.drawing import Export
from vit_suite.attention.formats import FORMATS, files_of
from vit_suite.attention.manifest import NAME, OK, Records, column, discard_parts, write_manifest
from vit_suite.data.decode import DecodeError
from vit_suite.data.quarantine import Quarantine
from vit_suite.errors import UserError


def merge(summary: Any, export: Export) -> None:
    """Write the files about all pictures from the records of all ranks, and fill an `ExportSummary`.

    UserError when not one picture decoded: then nothing is left behind.
    """
    drawing, pictures, output = export.drawing, export.pictures, export.drawing.output
    records = Records(output, distributed.world_size())
    (output / "quarantine.txt").unlink(missing_ok=True)  # of an earlier export
    for record in records:
        if "error" in record:
            summary.failures.append(DecodeError(record["path"], record["error"]))
            continue
        summary.images += 1
        for name in ("shrunk", "coarse", "reduced", "artifacts"):
            setattr(summary, name, getattr(summary, name) + record[name])
    summary.failures.extend(pictures.source.failures)  # folders that could not be listed
    try:
        if not summary.images:
            raise UserError(f"none of the {len(pictures)} images decodes; the first: {summary.failures[0]}")
        lines: list[dict[str, Any]] = []
        for kind, row in FORMATS.items():
            if row.gather and kind in drawing.formats:
                lines += row.gather(export, records, kind)

        def rows() -> Iterator[dict[str, Any]]:
            yield from _rows(export, records)
            yield from (line | {"status": OK} for line in lines)

        write_manifest(output / NAME, (_counted(row, summary) for row in rows()))
        if summary.failures:
            summary.quarantine = output / "quarantine.txt"
            Quarantine(summary.quarantine, limit=1.0).report(summary.failures, "the images", len(pictures))
    finally:
        records.close()
        discard_parts(output)


def _counted(row: dict[str, Any], summary: Any) -> dict[str, Any]:
    """The row, counted in `summary.files` when it is a file."""
    if row["status"] == OK:
        summary.files[row["kind"]] += 1
    return row


def _rows(export: Export, records: Records) -> Iterator[dict[str, Any]]:
    """Lines of the manifest, picture by picture."""
    drawing, pictures = export.drawing, export.pictures
    for record in records:
        image = {"image": pictures.path(record["index"])}
        if "error" in record:
            yield image | {"status": record["error"]}
            continue
        size = record["height"], record["width"]
        image |= {"height": size[0], "width": size[1], "status": OK}
        for kind, label, name in files_of(drawing, pictures.names[record["index"]], export.heads, size):
            threshold = drawing.threshold if FORMATS[kind].thresholded else ""
            yield image | {"kind": kind, "head": column(label), "file": name, "threshold": threshold}
