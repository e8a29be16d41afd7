"""`vit-suite make_shards`: a data set as tar files, and the command that trains on them."""

from __future__ import annotations

import sys

from vit_suite.config import MakeShardsConfig
from vit_suite.data.pack import pack
from vit_suite.data.registry import DATASETS
from vit_suite.errors import counted
from vit_suite.logs import speak

SHOWN = 20
"""Files that are named of those that could not be read."""


def run(cfg: MakeShardsConfig) -> None:
    """Pack, and say how much."""
    speak()
    packed = pack(cfg)
    print(
        f"{counted(packed.images, 'image')} in {counted(packed.shards, 'shard')}, {packed.size / 2**20:.0f} MiB,"
        f" in {cfg.output}"
    )
    if packed.left_out:
        print(f"{len(packed.left_out)} files could not be read and are left out:", file=sys.stderr)
        print("\n".join(f"  {line}" for line in packed.left_out[:SHOWN]), file=sys.stderr)
        if len(packed.left_out) > SHOWN:
            print(f"  ... and {len(packed.left_out) - SHOWN} more", file=sys.stderr)
    # Shards do not say which set they hold, so the statistics that views subtract have to be given.
    info, plain = DATASETS[cfg.data.name], DATASETS["shards"]
    words = "".join(f" --data.{key} {' '.join(map(str, getattr(info, key)))}" for key in ("mean", "std"))
    statistics = words if info.mean != plain.mean else ""
    print(f"next: vit-suite pretrain --data.name shards --data.root {cfg.output}{statistics}")
