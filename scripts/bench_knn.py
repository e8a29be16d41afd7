"""Weighted kNN of features: ours beside the way of DINO's eval_knn.py, on this machine.

    python scripts/bench_knn.py [--bank 50000] [--queries 10000] [--dim 384] [--k 20]
        [--peer DINO_CHECKOUT] [--output FILE.json]

Queries a second (median of the rounds and their spread), FLOP/s of the one big product and their share of the machine's
own matrix products in fp32, and peak memory in a process of its own. Ours takes its candidates from products in bf16,
where these are native, or in fp32; it finds the same. `plain` follows the description of that file: the whole bank at
once, a hundredth of the queries at a time, one product, topk, and a vote through one-hot rows. `--peer` is a checkout
of facebookresearch/dino, whose knn_classifier is then called. The features lie around a direction a class, as those of
a trained network do; the top-1 must be the same for all. Ratios are to the last row.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from unittest import mock

import torch
from bench_common import add_ratios, added, in_turn, parse, peak_memory, publish
from torch import Tensor
from torch.nn import functional

from vit_suite.evaluation import search
from vit_suite.evaluation.knn import KNNOptions, knn_classify
from vit_suite.hardware import matmul_rate, native_bf16

CLASSES = 100
TEMPERATURE = 0.07


def features(count: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """Unit rows (count, dim) around one direction a class, and their classes (count,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    centers = torch.randn(CLASSES, dim, generator=torch.Generator().manual_seed(0))
    return functional.normalize(centers[labels] + 3 * torch.randn(count, dim, generator=generator), dim=1), labels


def plain(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: int) -> float:
    """Top-1 in percent, the straightforward way."""
    hits, part = 0, max(1, len(queries) // 100)
    for rows, truth in zip(queries.split(part), labels.split(part), strict=True):
        similarities, neighbours = torch.mm(rows, bank.T).topk(k, sorted=True)
        one_hot = functional.one_hot(bank_labels[neighbours], CLASSES)  # (Q, k, C)
        votes = (one_hot * (similarities / TEMPERATURE).exp().unsqueeze(2)).sum(1)
        hits += int((votes.sort(1, descending=True).indices[:, 0] == truth).sum())
    return 100 * hits / len(queries)


def contenders(options: argparse.Namespace) -> dict[str, Callable[[], float]]:
    """Name -> a call that classifies all queries; top-1 in percent. The last is what the others are compared to."""
    k, (bank, bank_labels) = options.k, features(options.bank, options.dim, 1)
    queries, labels = features(options.queries, options.dim, 2)

    def ours(bf16: bool) -> float:
        with mock.patch.object(search, "native_bf16", lambda device: bf16):
            return knn_classify(
                bank, bank_labels, queries, labels, options=KNNOptions(ks=[k], temperature=TEMPERATURE, classes=CLASSES)
            ).top1[k]

    calls = {"ours bf16": lambda: ours(True)} if native_bf16(torch.device("cpu")) else {}
    calls |= {"ours fp32": lambda: ours(False), "plain": lambda: plain(bank, bank_labels, queries, labels, k)}
    if options.peer:
        sys.path.insert(0, str(options.peer))
        from eval_knn import knn_classifier

        calls["official"] = lambda: knn_classifier(bank, bank_labels, queries, labels, k, TEMPERATURE, CLASSES)[0]
    return calls


def measure(options: argparse.Namespace) -> list[dict]:
    """A row for each contender."""
    calls = contenders(options)
    scores = {name: call() for name, call in calls.items()}
    times = in_turn(calls, options.rounds)
    rate, flops = matmul_rate("fp32", torch.device("cpu")), 2 * options.bank * options.dim
    rows = []
    for name in calls:
        row = {"contender": name} | times[name].row(options.queries, "queries")
        row |= {"seconds": options.queries / row["queries/s"], "GFLOP/s": row["queries/s"] * flops / 1e9}
        row["of matmul rate"] = row["queries/s"] * flops / rate
        rows.append(row | {"peak MiB": peak_memory(name), "top-1": scores[name]})
    add_ratios(rows, "queries")
    return rows


def main() -> None:
    """Parses the options, measures, prints, and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", type=int, default=50_000, help="rows of the bank (default: 50,000)")
    parser.add_argument("--queries", type=int, default=10_000, help="rows that are classified (default: 10,000)")
    parser.add_argument("--dim", type=int, default=384, help="width of a row (default: 384)")
    parser.add_argument("--k", type=int, default=20, help="neighbours (default: 20)")
    options = parse(parser, "searches")
    if options.only:
        print(added(contenders(options)[options.only]))
        return
    size = {name: getattr(options, name) for name in ("bank", "queries", "dim", "k")}
    publish(measure(options), options.output, **size)


if __name__ == "__main__":
    main()
