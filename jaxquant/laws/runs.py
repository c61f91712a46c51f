"""Runs that a law can be fitted to: their columns, checked, with words for what is wrong."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxquant.laws.law import Columns, Law, check_law, read_columns

_SAME = ("tokenizer", "vocab_size")  # columns in which runs to compare agree
_MOST_BITS = 64
_TRAINED = ("P_w", "P_a", "P_kv")  # bits of training, which a loss is not independent of
_FAR = (
    1e4  # a factor between a run's N or D and the next, beyond which it alone decides an exponent
)


def check_runs(law: Law, runs: Any) -> tuple[Columns, np.ndarray]:
    """Returns (the law's columns, its target), where they are fit for a fit.

    Raises:
        ValueError: as of `fit`.
    """
    check_law(law)
    _check_kind(runs)
    columns = read_columns(runs, (*law.columns, law.target))
    target = columns.pop(law.target)
    least = len(law.parameters) + 3  # so that a criterion corrected for few runs has a value
    if len(target) < least:
        raise ValueError(
            f"{law.name} has {len(law.parameters)} parameters and needs {least} runs or more; "
            f"got {len(target)}"
        )
    for name, column in columns.items():
        if np.unique(column).size < 2:
            raise ValueError(
                f"all runs have {name} = {column[0]:g}: what it does cannot be told; give runs that differ "
                "in it, or a law without it"
            )
        if name.startswith("P_") and column.max() > _MOST_BITS:
            raise ValueError(f"{name} holds bits, up to {_MOST_BITS}; got {column.max():g}")
    if np.unique(target).size < 2:
        raise ValueError(f"all runs have {law.target} = {target[0]:g}: there is nothing to fit")
    if law.check_fit is not None:
        law.check_fit(columns)
    _check_floor(law, runs, target)
    for name in _SAME:
        _check_one(runs, name)
    return columns, target


def doubts(law: Law, runs: Any) -> tuple[str, ...]:
    """Returns warnings about checked runs: what a fit takes but would be misled by."""
    columns = read_columns(runs, (*law.columns, law.target))
    said = [*_far_away(columns), *_unread_bits(law, runs, columns), *_below_full(columns)]
    table = np.stack([*columns.values()], axis=1)
    if again := len(table) - len(np.unique(table, axis=0)):
        said.append(f"{again} of {len(table)} runs repeat another, number for number")
    return tuple(said)


def _far_away(columns: Columns) -> list[str]:
    """Returns a warning for each of N and D with an end far from all other runs, such as a typing error."""
    said = []
    for name in {"N", "D"} & set(columns):
        values = np.unique(columns[name])
        for end, near in ((values[0], values[1]), (values[-1], values[-2])):
            factor = float(max(end, near) / min(end, near))
            if factor > _FAR:
                said.append(
                    f"{name} = {end:.3g} is a factor of {factor:.2g} from that of every other run"
                )
    return sorted(set(said))


def _unread_bits(law: Law, runs: Any, columns: Columns) -> list[str]:
    """Returns warnings about bits of training that differ between runs, and that the law ignores."""
    read = [columns[name] for name in law.columns if name.startswith("P_")]
    said = []
    for name in _TRAINED:
        column = None if name in law.columns else _optional(runs, name)
        if column is None:
            continue
        try:
            values = np.asarray(column, np.float64)
        except (TypeError, ValueError):
            continue
        alike = any(np.array_equal(values, own, equal_nan=True) for own in read)
        if not alike and np.unique(values).size > 1:
            said.append(f"{name} differs between the runs, and {law.name} does not read it")
    return said


def _below_full(columns: Columns) -> list[str]:
    """Returns a warning where most gaps to full precision are not above 0, and the law can only add one."""
    if "loss_full" not in columns:
        return []
    below = int((columns["loss"] <= columns["loss_full"]).sum())
    count = len(columns["loss"])
    if 2 * below <= count:
        return []
    return [f"{below} of {count} runs are no worse than full precision: there is no gap to fit"]


def number_column(runs: Any, name: str, count: int) -> np.ndarray:
    """Returns a further column of numbers, one for each run.

    Raises:
        ValueError: it is missing, of another length, or holds what is no finite number.
    """
    column = _optional(runs, name)
    if column is None:
        raise ValueError(f"runs have no column {name!r}")
    try:
        found = np.asarray(column, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"column {name!r} holds numbers; got {column!r}") from None
    if found.shape != (count,) or not np.isfinite(found).all():
        raise ValueError(f"column {name!r} holds {count} finite numbers, one a run")
    return found


def places(runs: Any, groups: str | None, count: int) -> np.ndarray:
    """Returns the number of the unit that each run belongs to: itself, or its group.

    Raises:
        ValueError: a column of groups that is not there, or has one group alone.
    """
    if groups is None:
        return np.arange(count)
    column = _optional(runs, groups) if isinstance(groups, str) else None
    if column is None:
        raise ValueError(f"groups names a column of the runs; they have no {groups!r}")
    column = np.array([str(x) for x in np.asarray(column, object).ravel()])
    if len(column) != count:
        raise ValueError(f"column {groups!r} has {len(column)} groups for {count} runs")
    _, place = np.unique(column, return_inverse=True)
    if place.max() < 1:
        raise ValueError(f"column {groups!r} has one group alone; resampling needs several")
    return place


def strata_of_units(runs: Any, strata: str | None, place: np.ndarray) -> np.ndarray:
    """Returns the number of the stratum of each unit: one for all where no column is named.

    Raises:
        ValueError: a column that is not there; a unit in several strata, or alone in its stratum.
    """
    units = int(place.max()) + 1
    if strata is None:
        return np.zeros(units, int)
    column = _optional(runs, strata) if isinstance(strata, str) else None
    if column is None:
        raise ValueError(f"strata must name a column of the runs; they have no {strata!r}")
    column = np.array([str(x) for x in np.asarray(column, object).ravel()])
    if len(column) != len(place):
        raise ValueError(f"column {strata!r} has {len(column)} values for {len(place)} runs")
    names, number = np.unique(column, return_inverse=True)
    found = np.zeros(units, int)
    found[place] = number
    if (found[place] != number).any():
        raise ValueError(f"each unit must lie in one stratum of {strata!r}; some lie in several")
    alone = np.flatnonzero(np.bincount(found, minlength=len(names)) == 1)
    if alone.size:
        raise ValueError(
            f"each stratum of {strata!r} must have two units or more to resample; "
            f"{names[alone[0]]} has one"
        )
    return found


def _check_kind(runs: Any) -> None:
    is_table = isinstance(runs, Mapping) or hasattr(runs, "columns") or _names(runs) is not None
    if not is_table:
        raise ValueError(
            "runs are a mapping of columns, such as a data frame or a dict of arrays; got a "
            f"{type(runs).__name__}"
        )


def _names(runs: Any) -> Any:
    """Returns the fields of an array of records."""
    return getattr(getattr(runs, "dtype", None), "names", None)


def _check_floor(law: Law, runs: Any, target: np.ndarray) -> None:
    floor = _optional(runs, "entropy_rate")
    if law.target != "loss" or floor is None:
        return
    values = np.asarray(floor, object).ravel()
    try:
        known = np.array([math.nan if x is None else float(x) for x in values])
        known = np.broadcast_to(known, target.shape)
    except (TypeError, ValueError):
        raise ValueError(
            f"column 'entropy_rate' holds a number, or none, a run; got {floor!r}"
        ) from None
    below = np.flatnonzero(target < known)
    if below.size:
        i = below[0]
        raise ValueError(
            f"run {i} has a loss of {target[i]:.4g}, below the source's entropy of {known[i]:.4g} "
            "nats per token"
        )


def _check_one(runs: Any, name: str) -> None:
    column = _optional(runs, name)
    if column is None:
        return
    values = sorted({str(x) for x in np.asarray(column, object).ravel()})
    if len(values) > 1:
        raise ValueError(
            f"losses per token of several tokenizers cannot be compared; got {name} {', '.join(values)}"
        )


def _optional(runs: Any, name: str) -> Any:
    try:
        return runs[name]
    except (KeyError, IndexError, TypeError, ValueError):
        return None
