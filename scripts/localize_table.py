"""The scores of `vit-suite localize` as Markdown, from one or more results.json: a row a method, its untrained self in
brackets.

python scripts/localize_table.py runs/*/results.json
"""

from __future__ import annotations

import sys

from vit_suite.reports.results import read_results

MEASURES = {"jaccard": "Jaccard %", "box_iou": "box IoU %", "corloc": "CorLoc %", "pointing": "pointing %"}


def markdown(entry: dict) -> str:
    """One entry: `method | score (untrained)`, the centerd box and the whole image last; the protocol above it."""
    metrics, protocol = entry["metrics"], entry["protocol"]
    own, untrained = (rows for rows in list(metrics.values())[:2])
    measures = [name for name in MEASURES if name in next(iter(own.values()))]
    size = protocol["shorter_side"]
    seen = f"at {size} px" if size != "own" else "at their own size"
    lines = [
        f"`{protocol.get('checkpoint', '')}`, {protocol['truth']}: {protocol['scored']} images {seen}\n",
        "| (untrained) | " + " | ".join(MEASURES[name] for name in measures) + " |",
        "|---" * (len(measures) + 1) + "|",
    ]
    for method, row in own.items():
        threshold = f" at {row['threshold']:g}" if "threshold" in row else ""
        lines.append(
            f"| {method}{threshold} | "
            + " | ".join(f"{row[m]:.1f} ({untrained[method][m]:.1f})" for m in measures)
            + " |"
        )
    for name, title in (("center_box", "center box of the best fixed size"), ("whole_image", "whole image")):
        lines.append(f"| {title} | " + " | ".join(f"{metrics[name][m]:.1f}" for m in measures) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    found = [entry for path in sys.argv[1:] for entry in read_results(path) if entry["task"] == "localize"]
    print("\n\n".join(map(markdown, found)) if found else __doc__)
