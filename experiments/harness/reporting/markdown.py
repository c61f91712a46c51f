"""Measured figures in Markdown: tables between markers, and phrases, each made from committed records.

    <!-- table: STUDY/NAME -->
    | … |
    <!-- end of table -->

`python -m experiments.tables` writes what stands between the markers.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

_BEGIN, _END = "<!-- table: ", "<!-- end of table -->"
_BLOCK = re.compile(
    rf"^{re.escape(_BEGIN)}(?P<name>\S+) -->\n(?P<body>.*?)^{re.escape(_END)}$",
    re.DOTALL | re.MULTILINE,
)


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of the pages.

    Attributes:
        records: the JSON that it is made from, below ``experiments/results``; with a ``*``, all such files.
        make: from the JSON's value, or a list of values where there is a ``*``, to Markdown.
    """

    records: str
    make: Callable[[Any], str]


@dataclasses.dataclass(frozen=True)
class Phrases:
    """What pages say of records outside tables.

    Attributes:
        records: as of `Table`.
        make: from the value to phrases with figures, by the page that each has to stand in.
    """

    records: str
    make: Callable[[Any], Mapping[str, Sequence[str]]]


def typeset(text: str) -> str:
    """Numbers below zero with a minus sign, as the pages have them.

    >>> typeset("-0.5 [-1e-3, +0.1], W8-A8")
    '−0.5 [−1e-3, +0.1], W8-A8'
    """
    return re.sub(r"(?<![\w.])-(?=\d)", "−", text)


def to_markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; cells are Markdown.

    >>> print(to_markdown(["N", "δ"], [["21k", "-0.5"]]))
    | N | δ |
    |---|---|
    | 21k | −0.5 |

    Raises:
        ValueError: a row of another length than the head, or none.
    """
    lines = [_row(head), "|" + "---|" * len(head)]
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"a row needs {len(head)} cells, {', '.join(head)}; got {list(row)}")
        lines.append(typeset(_row(row)))
    if len(lines) == 2:
        raise ValueError(f"the table with columns {', '.join(head)} has no rows")
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def blocks(text: str) -> dict[str, str]:
    """What stands between markers, by the table's name.

    Raises:
        ValueError: a marker without its end, an end without its marker, or a name that comes twice.

    >>> blocks("<!-- table: a/b -->\\n| x |\\n<!-- end of table -->")
    {'a/b': '| x |'}
    """
    found = {m["name"]: m["body"].rstrip("\n") for m in _BLOCK.finditer(text)}
    begun, ended = (
        len(re.findall(f"^{re.escape(mark)}", text, re.MULTILINE)) for mark in (_BEGIN, _END)
    )
    if not begun == ended == len(found):
        raise ValueError(
            f"each '{_BEGIN}NAME -->' needs a line of its own, a name of its own and '{_END}' below; got "
            f"{begun} markers, {ended} ends, and of both {len(found)}: {', '.join(found)}"
        )
    return found


def replaced(text: str, tables: Mapping[str, str]) -> str:
    """A page with these tables between their markers; others stay.

    >>> replaced("<!-- table: a/b -->\\n<!-- end of table -->", {"a/b": "| x |"})
    '<!-- table: a/b -->\\n| x |\\n<!-- end of table -->'
    """

    def one(match: re.Match) -> str:
        name = match["name"]
        return f"{_BEGIN}{name} -->\n{tables[name]}\n{_END}" if name in tables else match[0]

    return _BLOCK.sub(one, text)


def table_differences(text: str, tables: Mapping[str, str]) -> list[str]:
    """A line for each row of a page's tables that is not what these say.

    >>> table_differences("<!-- table: a/b -->\\n| x |\\n<!-- end of table -->", {"a/b": "| y |"})
    ['a/b: the page has "| x |", its records give "| y |"']
    """
    said = []
    for name, body in blocks(text).items():
        pairs = itertools.zip_longest(
            body.splitlines(), tables.get(name, body).splitlines(), fillvalue=""
        )
        said += [
            f'{name}: the page has "{old}", its records give "{new}"'
            for old, new in pairs
            if old != new
        ]
    return said


def missing_phrases(text: str, phrases: Iterable[str]) -> list[str]:
    """A line for each phrase that does not stand in a page, wherever its lines are broken.

    >>> missing_phrases("γ is\\n0.4 [0.3, 0.5]", ["γ is 0.4 [0.3, 0.5]", "γ is 0.5"])
    ['the page does not say "γ is 0.5", as its records do']
    """
    flat = " ".join(text.split())
    said = [typeset(phrase) for phrase in phrases]
    return [f'the page does not say "{p}", as its records do' for p in said if p not in flat]


INTERVAL = re.compile(
    r"[+−]?\d[\d.]*(?: ?%| bits| points| nats)? ?\[[+−]?\d[\d.]*, [+−]?\d[\d.]*\]"
)


def intervals(text: str) -> set[str]:
    """The figures with intervals that a text quotes, without their units.

    >>> sorted(intervals("0.4 [0.3, 0.5], by 7.4 bits [7.1, 7.7]"))
    ['0.4 [0.3, 0.5]', '7.4 [7.1, 7.7]']
    """
    found = INTERVAL.findall(" ".join(text.split()))
    return {re.sub(r"^([+−]?[\d.]+)[^\[]*", r"\1 ", figure) for figure in found}
