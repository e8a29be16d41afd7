"""A YAML text as a tree of nodes, read without recursion and within limits.

PyYAML's own composer recurses once a level and repeats whatever an alias names, so a small file can exhaust the stack
or the memory. Here the parser's events are read in a loop, and a text beyond the limits is refused by its line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

MOST_BYTES = 1_000_000
"""Longest text. The longest recipe of the suite has 3,000 bytes."""
MOST_DEPTH = 10
"""Deepest nesting. Options are nested two deep, and a list in them makes three."""
MOST_NODES = 10_000
"""Most values; what an alias repeats counts each time. A config has about 200."""
CORE_TAGS = frozenset(
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map", "merge")
)
"""Types that YAML itself has for the values of a config."""


class YAMLProblem(ValueError):
    """The text is no YAML, or beyond the limits."""

    def __init__(self, message: str, line: int | None = None):
        super().__init__(message)
        self.line = line  # counted from 1


@dataclass
class Node:
    """A scalar, a sequence or a mapping of a YAML text."""

    kind: Literal["scalar", "sequence", "mapping"]
    line: int
    """Where it begins, counted from 1."""
    text: str = ""
    """A scalar as written."""
    is_null: bool = False
    """Whether a scalar means nothing: empty, `null`, or `~`, without quotes."""
    items: list[Node] = field(default_factory=list)
    """Of a sequence its items; of a mapping key, value, key, value."""
    size: int = 1
    """Values in it, itself included, with those that aliases repeat."""

    @property
    def pairs(self) -> list[tuple[Node, Node]]:
        """(key, value) of a mapping."""
        return list(zip(self.items[::2], self.items[1::2], strict=True))


def read_tree(text: str | bytes) -> Node | None:
    """The one document of a YAML text; None when the text is empty. Raises YAMLProblem."""
    import yaml

    if len(text) > MOST_BYTES:
        raise YAMLProblem(f"is no config: longer than {MOST_BYTES:,} bytes")
    try:
        return _read(yaml.parse(text, Loader=yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        raise YAMLProblem(f"not valid YAML: {error.problem or error.context}", line) from None
    except yaml.YAMLError:
        raise YAMLProblem("not valid YAML: not a text file") from None


def plain(node: Node) -> Any:
    """A node as text, None, and lists of these; a mapping, which no option has for a value, as an empty dictionary."""
    if node.kind == "sequence":
        return [plain(item) for item in node.items]
    if node.kind == "mapping":
        return {}
    return None if node.is_null else node.text


def _read(events: Any) -> Node | None:
    """Build the tree from the parser's events."""
    root: Node | None = None
    documents = 0
    open_nodes: list[tuple[Node, str | None]] = []  # with the anchor that names them
    anchors: dict[str, Node] = {}
    for event in events:
        name, line = type(event).__name__, event.start_mark.line + 1
        if name == "DocumentStartEvent":
            documents += 1
            if documents > 1:
                raise YAMLProblem("not valid YAML: expected a single document in the stream", line)
        elif name in ("SequenceEndEvent", "MappingEndEvent"):
            node, anchor = open_nodes.pop()
            if anchor:
                anchors[anchor] = node
            root = _attach(node, open_nodes, line) or root
        elif name in ("SequenceStartEvent", "MappingStartEvent"):
            _check_tag(event.tag, line)
            if len(open_nodes) >= MOST_DEPTH:
                raise YAMLProblem(f"nested too deep: expected at most {MOST_DEPTH} levels", line)
            open_nodes.append((Node("sequence" if name.startswith("Seq") else "mapping", line), event.anchor))
        elif name == "ScalarEvent":
            _check_tag(event.tag, line)
            node = Node("scalar", line, event.value, _means_nothing(event))
            if event.anchor:
                anchors[event.anchor] = node
            root = _attach(node, open_nodes, line) or root
        elif name == "AliasEvent":
            root = _attach(_named(event.anchor, anchors, open_nodes, line), open_nodes, line) or root
    return root


def _attach(node: Node, open_nodes: list[tuple[Node, str | None]], line: int) -> Node | None:
    """Put a finished node into the innermost open node. Without an open node it is the root, and is returned."""
    if not open_nodes:
        return node
    parent = open_nodes[-1][0]
    parent.items.append(node)
    parent.size += node.size
    if parent.size > MOST_NODES:
        raise YAMLProblem(f"has too many values: expected at most {MOST_NODES:,}, repeated ones counted", line)
    return None


def _named(anchor: str, anchors: dict[str, Node], open_nodes: list[tuple[Node, str | None]], line: int) -> Node:
    """The node that an alias repeats."""
    if any(name == anchor for _, name in open_nodes):
        raise YAMLProblem(f"nested too deep: *{anchor[:40]} stands inside of what it repeats", line)
    if anchor not in anchors:
        raise YAMLProblem(f"not valid YAML: found undefined alias '{anchor[:40]}'", line)
    return anchors[anchor]


def _check_tag(tag: str | None, line: int) -> None:
    if tag is not None and tag not in CORE_TAGS:
        short = tag.replace("tag:yaml.org,2002:", "!!")
        raise YAMLProblem(f"the tag {short[:60]} is not for configs: write the value alone", line)


def _means_nothing(event: Any) -> bool:
    if event.tag is not None:
        return event.tag == "tag:yaml.org,2002:null"
    return event.implicit[0] and event.value in ("", "~", "null", "Null", "NULL")
