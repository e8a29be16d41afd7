"""Which keys of a file a network took: matched, missing, unexpected, of another shape, left out on purpose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class KeyReport:
    """The keys of a file beside those of a network."""

    matched: list[str]
    missing: list[str]
    """Keys of the network that are not in the file."""
    unexpected: list[str]
    """Keys of the file that the network does not have, and that no known other part has."""
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """Name -> shape in the file, shape in the network."""
    left_out: list[str] = field(default_factory=list)
    """Keys of heads, decoders and other parts that a backbone does not have."""

    @property
    def expected(self) -> int:
        """Keys that the network has."""
        return len(self.matched) + len(self.missing) + len(self.reshaped)

    @property
    def complete(self) -> bool:
        """Whether every key of the network was filled and none of the file is left unexplained."""
        return not (self.missing or self.unexpected or self.reshaped)

    def faults(self) -> str:
        """`2 missing, first 'norm.bias'; 1 unexpected, first 'blocks.5.norm1.weight'`."""
        parts = []
        if self.missing:
            parts.append(f"{len(self.missing)} missing, first '{self.missing[0]}'")
        if self.unexpected:
            parts.append(f"{len(self.unexpected)} unexpected, first '{self.unexpected[0][:80]}'")
        if self.reshaped:
            name, (theirs, ours) = next(iter(self.reshaped.items()))
            parts.append(f"{len(self.reshaped)} of another shape, first '{name}' ({theirs} in the file, {ours} here)")
        return "; ".join(parts)

    def __str__(self) -> str:
        text = f"{len(self.matched)} of {self.expected} keys matched"
        if not self.complete:
            text += f" ({self.faults()})"
        if self.left_out:
            text += f", {len(self.left_out)} left out (not of the backbone: {', '.join(_groups(self.left_out))})"
        return text


def _groups(names: list[str], shown: int = 4) -> list[str]:
    """First parts of the names, each once: `head, mask_token`."""
    firsts = list(dict.fromkeys(name.split(".")[0] for name in names))
    return firsts[:shown] + ["..."] * (len(firsts) > shown)


def compare(own: Mapping[str, Tensor], state: Mapping[str, Tensor], left_out: list[str] | None = None) -> KeyReport:
    """`state` of a file beside the network's `own`; only names and shapes are looked at."""
    both = [name for name in own if name in state]
    reshaped = {name: (tuple(state[name].shape), tuple(own[name].shape)) for name in both}
    reshaped = {name: shapes for name, shapes in reshaped.items() if shapes[0] != shapes[1]}
    return KeyReport(
        matched=[name for name in both if name not in reshaped],
        missing=[name for name in own if name not in state],
        unexpected=[name for name in state if name not in own],
        reshaped=reshaped,
        left_out=list(left_out or []),
    )
