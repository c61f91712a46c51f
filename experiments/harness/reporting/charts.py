"""Parts of charts that all studies share: scales with one legend, means with intervals, labelled lines."""

# Altair's layers are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportReturnType=false, reportGeneralTypeIssues=false

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import altair as alt
import pandas as pd

COLORS = (
    *("#3565b0", "#c2481c", "#23845a", "#8648b0", "#8f6b00", "#b32d68", "#4a6876", "#7a4a2b"),
    *("#0f7f8c", "#6a6f00"),
)
ORDERED = (
    *("#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#84b92d", "#b09a00"),
)
_RANGES = {
    "color": COLORS,
    "dash": ((1, 0), (6, 4), (2, 3), (10, 3, 2, 3)),
    "shape": ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down"),
}
_CHANNELS = {"color": alt.Color, "dash": alt.StrokeDash, "shape": alt.Shape}


@dataclasses.dataclass(frozen=True)
class Scale:
    """Names with a color, dash or shape each, alike in all panels of a figure, whose legend is drawn once.

    Attributes:
        title: of the legend.
        names: as the data has them.
        channel: "color", "dash" or "shape".
        is_ordered: colors of a sequence rather than of kinds.
        own: the marks in place of the usual ones.
    """

    title: str
    names: tuple[Any, ...]
    channel: str = "color"
    is_ordered: bool = False
    own: tuple = ()

    @classmethod
    def of(cls, title: str, values: Iterable[Hashable], channel: str = "color") -> "Scale":
        """A scale of the values, each once, in their order."""
        return cls(title, tuple(dict.fromkeys(values)), channel)

    @property
    def marks(self) -> list:
        """One for each name."""
        if self.is_ordered and not self.own:
            last = max(1, len(self.names) - 1)
            return [ORDERED[i * (len(ORDERED) - 1) // last] for i in range(len(self.names))]
        usual = self.own or _RANGES[self.channel]
        return [usual[i % len(usual)] for i in range(len(self.names))]

    def of_field(self, field: str) -> Any:
        """The encoding of a column by this scale."""
        marks = [list(m) if isinstance(m, tuple) else m for m in self.marks]
        scale = alt.Scale(domain=list(self.names), range=marks)
        return _CHANNELS[self.channel](f"{field}:N", title=self.title, scale=scale, sort=None)


def facets(
    table: pd.DataFrame, keys: str | list[str], draw: Callable[[pd.DataFrame], Any], title: Callable
) -> list:
    """A titled panel for each group; ``title`` takes the group's keys."""
    names = [keys] if isinstance(keys, str) else keys
    return [
        draw(rows).properties(title=title(*key)) for key, rows in table.groupby(names, sort=False)
    ]


def with_intervals(
    table: pd.DataFrame,
    value: str,
    axis: str,
    *,
    tooltip: Sequence[str] = (),
    scale: alt.Scale | None = None,
    shape: Any = None,
    is_across: bool = False,
    **encoded: Any,
) -> alt.LayerChart:
    """Points with bars from the columns "low" to "high", where these are known.

    Args:
        table: rows.
        value: the column of the points.
        axis: title of the values' axis.
        tooltip: columns.
        scale: of the values.
        shape: encoding of the points alone.
        is_across: values go to the right, not upwards.
        encoded: other encodings.
    """
    base = alt.Chart(table).encode(**encoded)
    scale = alt.Scale(zero=False, padding=14) if scale is None else scale
    name, kind = ("x", alt.X) if is_across else ("y", alt.Y)
    bars = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=2, clip=True)
    bars = bars.encode(**{name: kind("low:Q", title=axis, scale=scale), f"{name}2": "high:Q"})
    points = base.mark_point(filled=True, size=60, opacity=1, clip=True)
    shaped = {"shape": shape} if shape is not None else {}
    points = points.encode(
        **{name: kind(f"{value}:Q", title=axis, scale=scale)}, tooltip=list(tooltip), **shaped
    )
    return alt.layer(bars, points)


def reference(value: float, meaning: str, axis: str = "y") -> alt.LayerChart:
    """A dashed line at a value, with its meaning written on it."""
    base = alt.Chart(pd.DataFrame({"value": [value], "text": [meaning]}))
    at = {axis: "value:Q"}
    line = base.mark_rule(strokeDash=[6, 4], color="#555").encode(**at)
    place = (
        {"align": "left", "dx": 4, "dy": -6, "x": 0}
        if axis == "y"
        else {"align": "left", "dx": 4, "y": 8}
    )
    text_of = {"text": "text:N", **at}
    halo = base.mark_text(fontSize=11, stroke="white", strokeWidth=4, **place).encode(**text_of)
    words = base.mark_text(fontSize=11, color="#333", **place).encode(**text_of)
    return alt.layer(line, halo, words)


@dataclasses.dataclass(frozen=True)
class Axis:
    """A column along an axis.

    Attributes:
        column: of the data.
        title: of the axis.
        is_log: whether it is logarithmic.
        domain: the values' own where not given.
        ticks: where values are written; anywhere where not given.
        form: how they are written.
    """

    column: str
    title: str
    is_log: bool = False
    domain: tuple[float, float] | None = None
    ticks: Sequence[float] | None = None
    form: str = "~g"

    def ends(self, table: pd.DataFrame) -> tuple[float, float]:
        """The domain, or the least and the largest value."""
        values = table[self.column]
        return self.domain or (float(values.min()), float(values.max()))

    def to(self, kind: type, domain: tuple[float, float] | None) -> Any:
        """The encoding, over a domain."""
        usual = {"tickCount": 6, "labelOverlap": True}
        ticks = usual if self.ticks is None else {"values": list(self.ticks), "labelOverlap": False}
        axis = alt.Axis(format=self.form, **ticks)
        log = {"type": "log"} if self.is_log else {"zero": False}
        fixed = {} if domain is None else {"domain": list(domain)}
        scale = alt.Scale(**log, **fixed, nice=False)
        return kind(f"{self.column}:Q", title=self.title, axis=axis, scale=scale)


def labelled_lines(
    means: pd.DataFrame,
    points: pd.DataFrame | None,
    x: Axis,
    y: Axis,
    name: str,
    scale: Scale,
    *,
    suffix: str = "",
    dash: Any = None,
    is_at_start: bool = False,
    tooltip: Sequence[str] = (),
) -> alt.LayerChart:
    """Lines of means with their names at their ends, and single values as points.

    Args:
        means: rows of the lines.
        points: rows of single values, with the same columns.
        x: along.
        y: upwards.
        name: column of the lines' names.
        scale: of the names.
        suffix: behind each label.
        dash: encoding of the lines alone.
        is_at_start: names stand where lines begin, which is where they are apart.
        tooltip: of points.
    """
    labels = _labels(means, x.column, y, name, is_at_start)
    widest = max((len(f"{n}{suffix}") for n in labels[name]), default=0)
    share = min(0.45, _PER_LETTER * (widest + 1.5))
    room = 1.04 * share / (1 - share)
    around = (room, 0.04) if is_at_start else (0.04, room)
    at_x = x.to(alt.X, _widened(x.ends(means), x.is_log, *around))
    drawn_y = means if points is None else pd.concat([means, points])
    at_y = y.to(alt.Y, y.domain or _widened(y.ends(drawn_y), y.is_log, 0.03, 0.03))
    color = scale.of_field(name)
    lines = alt.Chart(means).mark_line(clip=True).encode(x=at_x, y=at_y, color=color)
    layers = [lines if dash is None else lines.encode(strokeDash=dash)]
    if points is not None:
        drawn = alt.Chart(points).mark_circle(size=26, opacity=0.55, clip=True)
        layers.append(drawn.encode(x=at_x, y=at_y, color=color, tooltip=list(tooltip)))
    words = labels.assign(label=labels[name].astype(str) + suffix)
    side = {"align": "right", "dx": -6} if is_at_start else {"align": "left", "dx": 6}
    side |= {"fontSize": 11, "fontWeight": "bold"}
    named = alt.Chart(words).encode(x=at_x, y=at_y, text="label:N")
    halo = named.mark_text(**side, stroke="white", strokeWidth=4)
    return alt.layer(*layers, halo, named.mark_text(**side).encode(color=color))


_PER_LETTER = 0.025  # of the width of a chart on a telephone
_APART = 0.07  # of the axis: the least distance of two labels


def _labels(means: pd.DataFrame, x: str, y: Axis, name: str, is_at_start: bool) -> pd.DataFrame:
    """The end of each line, moved up where two would be written over each other."""
    ends = (
        means.sort_values(x, ascending=is_at_start is False)
        .groupby(name, sort=False)
        .tail(1)
        .drop_duplicates(name)
    )
    ends = ends[[x, y.column, name]].dropna().sort_values(y.column)
    to, back = (math.log, math.exp) if y.is_log else (float, float)
    low, high = y.ends(means) if len(ends) else (1.0, 1.0)
    step = _APART * (to(high) - to(low))
    places: list[float] = []
    for value in ends[y.column]:
        places.append(max(to(value), places[-1] + step) if places else to(value))
    return ends.assign(**{y.column: [back(p) for p in places]})


def _widened(
    ends: tuple[float, float], is_log: bool, left: float, right: float
) -> tuple[float, float]:
    """A domain with room for the labels."""
    to, back = (math.log, math.exp) if is_log else (float, float)
    low, high = to(ends[0]), to(ends[1])
    span = (high - low) or 1.0
    return back(low - left * span), back(high + right * span)
