"""Efficiencies of few bits in published runs and in ours, by the forms that their authors fit."""

# pandas' selections are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportCallIssue=false

import dataclasses
from collections.abc import Mapping

import pandas as pd

from experiments.public_runs.readers import FULL
from jaxquant import laws

STARTS, BOOTSTRAPS = 16, 200
QUARTET_DELTA = 1e-4  # of Huber's loss on log L, as its authors have it
QUEST_DELTA = 1.0  # its notebook scales residuals so that all of them are squared
_JOINT = laws.quartet((4,), (4,))
FORWARD, BACKWARD = "QuEST/BF16", "BF16/AlbertTsengQuantizer"  # what the efficiencies are of
HELD, FREE = "base held", "all at once"  # which parameters were fitted

QUARTET_2025 = laws.Published(
    _JOINT,
    {
        **{"A": 127444.685, "alpha": 0.578520, "B": 465834.312, "beta": 0.538877},
        **{"E": 1.340846, "gamma": 0.276416, "eff_N_4": 0.645163, "eff_D_4": 0.893469},
    },
    "arXiv 2505.14669, as its notebooks/plots.ipynb prints them",
    {"N": (30482560, 822151168), "D": (7.5e8, 8e10)},
)
# QuEST's efficiency of FP4 weights and activations, in 4 bits (its notebooks/plots.ipynb, arXiv 2502.05003).
QUEST_2025_FP4 = 0.629639


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """An efficiency, as it was fitted here and as it was printed.

    Attributes:
        of: in words.
        how: which fit.
        value, low, high: of the fit.
        published: None where there is none.
        source: of the published value.
    """

    of: str
    how: str
    value: float
    low: float
    high: float
    published: float | None = None
    source: str = ""


def _of_fit(fit: laws.Fit, name: str, of: str, how: str, published=None, source="") -> Efficiency:
    return Efficiency(of, how, fit.params[name], *fit.interval(name), published, source)


def held(law: laws.Law, params: Mapping[str, float], free: tuple[str, ...], bits: dict) -> laws.Law:
    """Returns a law of N and D alone: some parameters free, the others and the bits held.

    Args:
        law: of N, D and bits.
        params: what is held, for each parameter that is not free.
        free: names of parameters.
        bits: from the other columns to the number that they hold.
    """

    def log_prediction(own, runs):
        return law.log_prediction({**params, **own}, {**runs, **bits})

    return dataclasses.replace(
        law,
        parameters=tuple(p for p in law.parameters if p.name in free),
        log_prediction=log_prediction,
        columns=("N", "D"),
        efficiency=None,
        widths=None,
        check_bits=None,
        check_fit=None,
    )


def quartet_base(table: pd.DataFrame, bootstraps: int = BOOTSTRAPS) -> laws.Fit:
    """Fits L = (A N^−α + B D^−β)^γ + E to the runs in full precision, as Quartet does.

    Args:
        table: of `readers.read_quartet`.
        bootstraps: refits.
    """
    bits = {"P_forward": 16.0, "P_backward": 16.0}
    free = tuple(n for n in _JOINT.names if not n.startswith("eff"))
    law = held(_JOINT, {"eff_N_4": 1.0, "eff_D_4": 1.0}, free, bits)
    full = table[table["scheme"] == FULL]
    return laws.fit(law, full, starts=2 * STARTS, bootstraps=bootstraps, delta=QUARTET_DELTA)


def quartet(
    table: pd.DataFrame, base: laws.Fit, bootstraps: int = BOOTSTRAPS
) -> tuple[laws.Fit, list[Efficiency]]:
    """Fits Quartet's two efficiencies: with the base held, as it does, and all parameters at once.

    Units of the bootstrap are (size, length); the interval with a base that is held leaves out what the base
    is off by.

    Args:
        table: of `readers.read_quartet`, with ``unit``.
        base: of `quartet_base`.
        bootstraps: refits.

    Returns:
        (the fit of all parameters, the efficiencies by both).
    """
    chosen = table[table["scheme"].isin([FULL, FORWARD, BACKWARD])]
    options = {"starts": STARTS, "bootstraps": bootstraps, "delta": QUARTET_DELTA}
    joint = laws.fit(_JOINT, chosen, groups="unit", **options)
    names = {
        "eff_N_4": (FORWARD, {"P_forward": 4.0, "P_backward": 16.0}),
        "eff_D_4": (BACKWARD, {"P_forward": 16.0, "P_backward": 4.0}),
    }
    found = []
    for name, (scheme, bits) in names.items():
        published, source = QUARTET_2025.params[name], "Castro et al. 2025"
        ones = {"eff_N_4": 1.0, "eff_D_4": 1.0}
        law = held(_JOINT, {**ones, **base.params}, (name,), bits)
        alone = laws.fit(law, table[table["scheme"] == scheme], **options)
        of = f"Quartet, {name.removesuffix('_4')} of {scheme}"
        found.append(_of_fit(alone, name, of, HELD, published, source))
        found.append(_of_fit(joint, name, of, FREE, published, source))
    return joint, found


def tied_widths(table: pd.DataFrame) -> pd.DataFrame:
    """Returns QuEST's rotated integer runs with one width for weights and activations, and full precision.

    Args:
        table: of `readers.read_quest`.
    """
    plain = "W" + table["P_w"].astype(str) + "A" + table["P_w"].astype(str)
    return table[(table["scheme"] == plain) | (table["scheme"] == FULL)]


def quest(table: pd.DataFrame, bootstraps: int = BOOTSTRAPS) -> tuple[laws.Fit, list[Efficiency]]:
    """Fits an efficiency for each width of W = A: L = A (N eff)^−α + B D^−β + E; that of FP4 beside it.

    Units of the bootstrap are (size, length).

    Args:
        table: of `readers.read_quest`, with ``unit``.
        bootstraps: refits.
    """
    own = tied_widths(table)
    fit = _by_width(own, bootstraps, groups="unit")
    source, printed = "Panferov et al. 2025", laws.QUEST_2025_EFFICIENCY
    found = [
        _of_fit(fit, f"eff_{b}", f"QuEST, {b} bits", FREE, printed.get(b), source)
        for b in fit.law.widths or ()
    ]
    fp4 = table[table["scheme"] == "W4A4, FP4"]
    if len(fp4) > 3:
        one = laws.free_efficiency(4)
        law = held(one, {n: fit.params[n] for n in one.names[:5]}, ("eff_4",), {"P_w": 4.0})
        alone = laws.fit(law, fp4, starts=STARTS, bootstraps=bootstraps, delta=QUEST_DELTA)
        found.append(_of_fit(alone, "eff_4", "QuEST, FP4", HELD, QUEST_2025_FP4, source))
    return fit, found


def ours(table: pd.DataFrame, bootstraps: int = BOOTSTRAPS) -> tuple[laws.Fit, list[Efficiency]]:
    """Fits the same form to our runs with QuEST's quantizer.

    Args:
        table: of `training_precision`, with ``unit``: units are (size, seed), resampled within sizes.
        bootstraps: refits.
    """
    fit = _by_width(table, bootstraps, groups="unit", strata="N")
    widths = fit.law.widths or ()
    return fit, [_of_fit(fit, f"eff_{b}", f"ours, {b} bits", FREE) for b in widths]


def _by_width(table: pd.DataFrame, bootstraps: int, **options: str) -> laws.Fit:
    widths = sorted({int(b) for b in table["P_w"] if b < 16})
    law = laws.free_efficiency(*widths)
    numbers = {"starts": STARTS, "bootstraps": bootstraps, "delta": QUEST_DELTA}
    return laws.fit(law, table, **numbers, **options)
