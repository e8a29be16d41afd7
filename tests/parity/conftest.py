"""Prints the parity table (fixture, largest error, tolerance) at the end of a session that ran parity tests."""

from __future__ import annotations

from .golden import RECORDS, golden_folder


def parity_table(records) -> list[str]:
    """Lines of a table with one row a (fixture, what): the largest error of its records beside the tolerance of that
    record."""
    worst: dict[tuple[str, str], object] = {}
    for row in records:
        key = (row.fixture, row.what)
        if key not in worst or not row.largest_error <= worst[key].largest_error:
            worst[key] = row
    cells = [("fixture", "what", "largest error", "tolerance", "")]
    for (fixture, what), row in sorted(worst.items()):
        error = "exact" if row.largest_error == 0 else f"{row.largest_error:.2e}"
        tolerance = "exact" if row.tolerance == 0 else f"{row.tolerance:.0e}"
        cells.append((fixture, what, error, tolerance, "" if row.passed else "FAILED"))
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def pytest_terminal_summary(terminalreporter):
    if RECORDS:
        terminalreporter.section(f"parity with {golden_folder()}")
        for line in parity_table(RECORDS):
            terminalreporter.write_line(line)
