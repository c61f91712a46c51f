"""What published tables say beside our records: efficiencies, and how the gap grows."""

# pandas' selections are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import dataclasses
from pathlib import Path

import pandas as pd

from experiments.public_runs import efficiencies, gaps, joint, readers
from experiments.public_runs.efficiencies import Efficiency
from experiments.public_runs.gaps import Growth
from experiments.public_runs.joint import Joint
from experiments.public_runs.readers import FULL
from experiments.training_precision import STUDY
from experiments.training_precision import runs as own_runs
from jaxquant import laws

METHODS = {"quest": "QuEST", "lsq": "LSQ", "ste": "straight-through"}
SHARED_LENGTHS = (20, 160)  # tokens per parameter that both have: the published runs begin at 24.3
SHARED = f", D/N of {SHARED_LENGTHS[0]} to {SHARED_LENGTHS[1]}"
NEAREST = "ours, QuEST, 4 bits"
TRANSFERRED = "ours, efficiency of 4 bits in Quartet's law of full precision"
_BESIDE = "QuEST beside Quartet's full precision, "


@dataclasses.dataclass(frozen=True)
class Tables:
    """Runs with ``unit``, what is resampled together.

    Attributes:
        quest, quartet: published runs; those whose loss rises with training are left out.
        left_out: these.
        ours: by method, one width for all tensors.
    """

    quest: pd.DataFrame
    quartet: pd.DataFrame
    left_out: pd.DataFrame
    ours: dict[str, pd.DataFrame]


@dataclasses.dataclass(frozen=True)
class Found:
    """All that is reported.

    Attributes:
        efficiencies: published forms, fitted here.
        fits: laws behind them, by name.
        growths: of published gaps.
        ours: of our gaps.
        theirs: that which ours is to predict: `efficiencies.FORWARD`.
        theirs_short: the same at `SHARED_LENGTHS`; None where these are too few.
        forward: its pairs.
        ratios: of `gaps.ratios`.
        full: both tables' losses in full precision where they have the same run.
        joint: laws of forward and backward bits on Quartet's runs.
    """

    efficiencies: list[Efficiency]
    fits: dict[str, laws.Fit]
    growths: list[Growth]
    ours: list[Growth]
    theirs: Growth
    theirs_short: Growth | None
    forward: pd.DataFrame
    ratios: pd.DataFrame
    full: pd.DataFrame
    joint: Joint


def read(quest: str | Path, quartet: str | Path, ours: str | Path) -> Tables:
    """Reads all tables.

    Args:
        quest, quartet: paths, as of `readers`.
        ours: the workdir of a ``training_precision`` study.

    Raises:
        ValueError: as of `readers`; no records in `ours`; none with QuEST's quantizer at 4 bits.
    """
    tables = {"QuEST": readers.read_quest(quest), "Quartet": readers.read_quartet(quartet)}
    kept, left = {}, []
    for name, table in tables.items():
        is_rising = readers.rising(table)
        own = table.assign(unit=table["size"] + "/" + table["D"].map("{:.0f}".format))
        kept[name] = own[~is_rising]
        left.append(own[is_rising].assign(table=name))
    mine = own_runs.at_best_rate(own_runs.runs(STUDY.load(ours)))
    by_method = {method: own_runs.tied(mine, method) for method in METHODS}
    widths = set(by_method["quest"]["P_w"])
    if not {4, 16} <= widths:
        raise ValueError(
            f"'{ours}' must hold runs of QuEST's quantizer with 4 and with 16 bits; it has "
            f"{', '.join(map(str, sorted(widths))) or 'none'}"
        )
    columns = ["table", "size", "scheme", "D", "loss"]
    return Tables(kept["QuEST"], kept["Quartet"], pd.concat(left)[columns], by_method)


def _growths(pairs: pd.DataFrame, prefix: str, by: str = "scheme") -> list[Growth]:
    """Growth of each scheme that has enough pairs."""
    groups = pairs.groupby(by, sort=False)
    found = (gaps.least_squares(own, f"{prefix}{name}") for name, own in groups)
    return [growth for growth in found if growth is not None]


def quartet_pairs(table: pd.DataFrame) -> pd.DataFrame:
    """Every run of few bits beside the one in full precision with its size and length."""
    return gaps.pair(table[table["scheme"] != FULL], table[table["scheme"] == FULL])


def quest_growths(tables: Tables, bootstraps: int) -> list[Growth]:
    """QuEST's gaps: to its own full precision, which is of one D/N, and to Quartet's, of the same N and D.

    Of the latter those widths alone that have several D/N.
    """
    quest = tables.quest.sort_values(["scheme", "N", "D"])
    few = quest[quest["scheme"] != FULL]
    found = _growths(gaps.pair(few, quest[quest["scheme"] == FULL]), "QuEST, ")
    tied = efficiencies.tied_widths(few)
    full = tables.quartet[tables.quartet["scheme"] == FULL]
    pairs = gaps.pair(tied, full)
    several = [own for _, own in pairs.groupby("scheme") if len(gaps.exponents_of(own)) > 1]
    if not several:
        return found
    pairs = pd.concat(several)
    found += _growths(pairs, _BESIDE)
    if pairs["P_w"].nunique() > 1:
        found.append(_by_error(pairs, f"{_BESIDE}all widths", bootstraps))
    return found


def _by_error(pairs: pd.DataFrame, of: str, bootstraps: int, **options: str) -> Growth:
    starts = efficiencies.STARTS // 2
    return gaps.by_error(pairs, of, starts=starts, bootstraps=bootstraps, **options)


def own_growths(ours: dict[str, pd.DataFrame], bootstraps: int) -> list[Growth]:
    """Our gaps: QuEST at 4 bits first, which is the nearest to what was published; then the others."""
    pairs = {
        method: gaps.pair(table[table["P_w"] < 16], table[table["P_w"] == 16], ("N", "D", "seed"))
        for method, table in ours.items()
        if len(table)
    }
    at_four = {method: own[own["P_w"] == 4] for method, own in pairs.items()}
    found = [gaps.least_squares(at_four["quest"], NEAREST, seed=1)]
    found.append(
        gaps.least_squares(_of_shared_lengths(at_four["quest"]), f"{NEAREST}{SHARED}", seed=1)
    )
    found += [
        gaps.least_squares(own, f"ours, {METHODS[method]}, 4 bits", seed=1)
        for method, own in at_four.items()
        if method != "quest"
    ]
    if pairs["quest"]["P_w"].nunique() > 1:
        found.insert(
            2, _by_error(pairs["quest"], "ours, QuEST, all widths", bootstraps, strata="N")
        )
    return [growth for growth in found if growth is not None]


def _of_shared_lengths(pairs: pd.DataFrame) -> pd.DataFrame:
    low, high = SHARED_LENGTHS
    ratio = pairs["D"] / pairs["N"]
    return pairs[(low < ratio) & (ratio < high)]


def shared_full(tables: Tables) -> pd.DataFrame:
    """Both tables' losses in full precision, where they have one size and length."""
    quest, quartet = (t[t["scheme"] == FULL] for t in (tables.quest, tables.quartet))
    columns = ["size", "N", "D", "loss"]
    found = quest[columns].merge(quartet[columns], on=["N", "D"], suffixes=("", " of Quartet"))
    return found.assign(difference=found["loss of Quartet"] - found["loss"])


def implied(fit: laws.Fit, pairs: pd.DataFrame) -> Growth | None:
    """The growth that Quartet's own law has at the runs' N and D, by the same least squares."""
    few = fit.predict(pairs.assign(P_forward=4, P_backward=16))
    full = fit.predict(pairs.assign(P_forward=16, P_backward=16))
    own = pairs.assign(added=few - full)
    return gaps.least_squares(own, "Quartet's law at its runs", bootstraps=200)


def analyse(tables: Tables, bootstraps: int = efficiencies.BOOTSTRAPS) -> Found:
    """All fits.

    Args:
        tables: of `read`.
        bootstraps: refits of each law; exponents of gaps have their own, by least squares.

    Raises:
        ValueError: tables without the runs that the questions are of.
    """
    base = efficiencies.quartet_base(tables.quartet, bootstraps)
    at_once, found = efficiencies.quartet(tables.quartet, base, bootstraps)
    by_width, of_quest = efficiencies.quest(tables.quest, bootstraps)
    mine, of_ours = efficiencies.ours(tables.ours["quest"], bootstraps)
    pairs = quartet_pairs(tables.quartet)
    growths = _growths(pairs, "Quartet, ")
    forward = pairs[pairs["scheme"] == efficiencies.FORWARD]
    theirs = next((g for g in growths if g.of.endswith(efficiencies.FORWARD)), None)
    if theirs is None or len(theirs.params) < 2:
        raise ValueError(
            f"Quartet's table must have {efficiencies.FORWARD} at several sizes and lengths, each with its "
            "run in full precision"
        )
    short = gaps.least_squares(_of_shared_lengths(forward), f"{theirs.of}{SHARED}")
    if short is not None:
        growths.insert(1, short)
    if (law := implied(at_once, forward)) is not None:
        growths.append(law)
    growths += quest_growths(tables, bootstraps)
    ours = own_growths(tables.ours, bootstraps)
    ours.append(gaps.transferred(base, mine, forward, TRANSFERRED))
    predictors = [g for g in ours if "gamma_D" in g.params]
    return Found(
        [*found, *of_quest, *of_ours],
        {"Quartet's base": base, "Quartet": at_once, "QuEST": by_width, "ours": mine},
        growths,
        ours,
        theirs,
        short,
        forward,
        gaps.ratios(forward, theirs, predictors),
        shared_full(tables),
        joint.compare(tables.quartet, bootstraps),
    )
