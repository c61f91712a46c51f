"""The tables of this study in the pages, and what they say of it in sentences."""

from experiments.harness.reporting.law_tables import interval
from experiments.harness.reporting.markdown import Phrases, Table, to_markdown
from experiments.harness.reporting.values import bounds
from experiments.training_precision import robustness
from experiments.training_precision.runs import METHOD_NAMES
from jaxquant import laws

_FULL = "training_precision/full/summary.json"
_RATES = "training_precision/rates/summary.json"
_TUNED = "training_precision/tuned/summary.json"
_GENERATED = "training_precision/generated/summary.json"
_PAGES = ("experiments/README.md", "docs/studies/training_precision.md")


def _optimum(found: dict, form: str = ".2f") -> str:
    """P* with its interval, where these runs determine it."""
    if not found["is_determined"]:
        return "not determined"
    return bounds(found["bits"], found["low"], found["high"], form)


def _parameter(fit: dict, name: str) -> dict:
    return next(p for p in fit["parameters"] if p["name"] == name)


def _exponents(fit: dict) -> list[str]:
    return [interval(_parameter(fit, name), ".2f") for name in ("gamma_D", "gamma_N")]


# ---------------------------------------------------------------------------------------------------
# One width: how the gap to full precision grows, and the best precision


def gaps(summary: dict) -> str:
    """How the gap of paired runs grows, by one law of all widths."""
    rows = [
        [
            METHOD_NAMES[m["method"]],
            f"{sum(w['points'] for w in m['gaps']['widths'])}",
            *_exponents(m["gaps"]["fit"]),
        ]
        for m in summary["methods"]
        if "fit" in m["gaps"]
    ]
    return to_markdown(["method", "pairs", "γ_D", "γ_N"], rows)


def tuned_gaps(summary: dict) -> str:
    """The gap at 4 bits, each width and length at the best of the learning rates that were tried."""
    best: dict[tuple, float] = {}
    for row in summary["rates"]:
        key = row["size"], row["d_over_n"], row["method"], row["P"]
        best[key] = min(float(row["loss"]), best.get(key, float("inf")))
    methods = list(dict.fromkeys(method for *_, method, bits in best if bits == 4))
    rows = [
        [size, f"{d}"] + [f"{best[size, d, m, 4] - best[size, d, 'ste', 16]:.3f}" for m in methods]
        for size, d in sorted({(key[0], key[1]) for key in best})
    ]
    return to_markdown(["N", "D/N", *(METHOD_NAMES[m] for m in methods)], rows)


def tuned(summary: dict) -> str:
    """How the gap at 4 bits grows at tuned rates: in all, and between each size's two longest runs."""
    rows = []
    for method in summary["methods"]:
        (own,) = (w for w in method["gaps"]["widths"] if w["P"] == 4)
        cells = [interval(x, ".2f") for x in (own["D"], own["N"], own["late"]["D"])]
        rows.append([METHOD_NAMES[method["method"]], f"{own['points']}", *cells])
    head = ["method", "pairs", "γ_D", "γ_N", "γ_D between the two longest runs"]
    return to_markdown(head, rows)


def growing(summary: dict) -> str:
    """The law of a penalty that grows, beside Panferov's: of runs whose tensors have one width."""
    head = (
        "method | runs, worth independent ones | AICc below that of Panferov's law | "
        "R², Panferov's | γ_D | γ_N"
    )
    return to_markdown(head.split(" | "), map(_growing, _fitted(summary)))


def _fitted(summary: dict) -> list[dict]:
    return [m for m in summary["methods"] if "laws" in m]


def _growing(method: dict) -> list[str]:
    """A row; without exponents where the runs do not tell such laws apart."""
    rows = {row["law"]: row for row in method["laws"]}
    own, other = rows[laws.GROWING_ERROR.name], rows[laws.PANFEROV.name]
    cells = [METHOD_NAMES[method["method"]], f"{method['runs']}, {method['independent']:.0f}"]
    r2 = f"{own['r2']:.3f}, {other['r2']:.3f}"
    if not method["kept"]:
        return [*cells, "too few to tell", r2, "", ""]
    lead = f"{other['aicc'] - own['aicc']:.0f}"
    return [*cells, lead, r2, *_exponents(method["fits"][laws.GROWING_ERROR.name])]


def held_out(summary: dict) -> str:
    """R² of runs that neither law was fitted to: those of each N, range of D, and width in turn."""
    head = ["method", *(f"R² held out by {name}, Panferov's" for name in _HELD_OUT.values())]
    return to_markdown(head, map(_of_held_out, _fitted(summary)))


_HELD_OUT = {"r2_by_N": "N", "r2_by_D": "D", "r2_by_P_w": "P"}


def _of_held_out(method: dict) -> list[str]:
    rows = {row["law"]: row for row in method["laws"]}
    pair = rows[laws.GROWING_ERROR.name], rows[laws.PANFEROV.name]
    cells = [", ".join(f"{row[key]:.2f}" for row in pair) for key in _HELD_OUT]
    return [METHOD_NAMES[method["method"]], *cells]


def budgets(summary: dict) -> str:
    """The best precision at each budget that a method's runs surround."""
    found = {m["method"]: {o["flops"]: o for o in m["optima"]} for m in _fitted(summary)}
    found = {method: optima for method, optima in found.items() if optima}
    rows = [
        [
            f"{flops:.0e}".replace("e+", "e"),
            *(_optimum(o[flops]) if flops in o else "" for o in found.values()),
        ]
        for flops in sorted({flops for optima in found.values() for flops in optima})
    ]
    return to_markdown(["C, operations", *(METHOD_NAMES[m] for m in found)], rows)


# ---------------------------------------------------------------------------------------------------
# Tensors apart, and serving


def tensors_apart(summary: dict) -> str:
    """Kumar's own law where weights, activations and cache have widths of their own."""
    names = {"gamma_w": "γ_w", "gamma_a": "γ_a", "gamma_kv": "γ_kv"}
    rows = []
    for method, found in summary["separate"].items():
        if "fit" in found:
            params = [interval(_parameter(found["fit"], name), ".2f") for name in names]
            rows.append([METHOD_NAMES[method], _optimum(found["optimum"]), *params])
    return to_markdown(["method", r"P\*", *names.values()], rows)


def served(summary: dict) -> str:
    """Of all pairs of widths, in how many training in few bits changes what serving in fewer costs."""
    rows = []
    for tensors, name in robustness.TENSORS.items():
        for kind, words in robustness.KINDS.items():
            own = robustness.selected(summary["robustness"], tensors, kind)
            if own:
                found = robustness.counts(own)
                counts = [f"{found[k]}" for k in ("lower", "higher", "not")]
                rows.append([name, words, f"{len(own)}", *counts])
    head = ("few bits in", "change of", "pairs", "lower", "higher", "not resolved")
    return to_markdown(head, rows)


# ---------------------------------------------------------------------------------------------------
# Sentences

_HEADLINE = 1e12  # operations at which the pages give the best precision of each method


def phrases(summary: dict) -> dict[str, list[str]]:
    """What the pages say of these runs in sentences."""
    by = {m["method"]: m for m in _fitted(summary)}
    at = {
        method: bounds(o["bits"], o["low"], o["high"], ".2f").replace(" [", "{} [", 1)
        for method, m in by.items()
        for o in m["optima"]
        if o["flops"] == _HEADLINE
    }
    optima = [at["ste"].format(" bits"), at["lsq"].format(""), at["quest"].format("")]
    ste, lsq, quest = optima
    runs, own = f"{summary['runs']:,} runs", [_apart_leads(summary), _served_less(summary)]
    found = f"at 1e12 operations {ste} with straight-through gradients, {lsq} with LSQ, {quest} with QuEST"
    return {
        "README.md": [runs, _exponents_in_line(by), _bits_in_line(by)],
        "docs/studies/index.md": [
            runs,
            f"at 1e12 operations {ste} straight-through, {lsq} LSQ, {quest} QuEST",
        ],
        "docs/studies/training_precision.md": [runs, found, *own],
        "experiments/README.md": [runs, *own],
    }


def _exponents_in_line(by: dict[str, dict]) -> str:
    grows = {m: _parameter(by[m]["gaps"]["fit"], "gamma_D") for m in ("ste", "lsq", "quest")}
    lsq, quest = (f"{grows[m]['value']:.2f} {METHOD_NAMES[m]}" for m in ("lsq", "quest"))
    return f"(γ_D {interval(grows['ste'], '.2f')} straight-through, {lsq}, {quest})"


def _bits_in_line(by: dict[str, dict]) -> str:
    ste, lsq = (
        ", ".join(f"{o['bits']:.3g}" for o in by[m]["optima"] if o["flops"] <= _HEADLINE)
        for m in ("ste", "lsq")
    )
    return f"{ste} bits at 1e11, 3e11, 1e12 operations, {lsq} with LSQ"


def _apart_leads(summary: dict) -> str:
    """By how much penalties that grow are likelier than Kumar's own law, for each method."""
    found = []
    for one in summary["separate"].values():
        aicc = {row["law"]: row["aicc"] for row in one["laws"]}
        found.append(f"{aicc[laws.KUMAR.name] - aicc[laws.GROWING.name]:.0f}")
    return f"(AICc less by {', '.join(found[:-1])} and {found[-1]})"


def _served_less(summary: dict) -> str:
    """The pair of widths, all tensors alike, for which serving adds the least beside 16 bits."""
    rows = robustness.selected(summary["robustness"], "all", "added")
    most = min(rows, key=lambda row: row["mean"])
    value = f"{-most['mean']:.2f} nats [{-most['high']:.2f}, {-most['low']:.2f}]"
    method = METHOD_NAMES[most["method"]]
    return f"{value} from {most['P']} bits to {most['P_post']} with {method} gradients"


def generated(summary: dict) -> dict[str, list[str]]:
    """The source of known entropy: what the law finds, and P* on it."""
    (method,) = _fitted(summary)
    entropy = summary["entropy"][0]
    (best,) = (o for o in method["optima"] if o["flops"] == 1e11)
    said = [
        f"{entropy['entropy']:.3f} nats per token",
        interval(entropy, ".2f"),
        f"{_optimum(best)} bits at 1e11 operations",
    ]
    return {page: said for page in _PAGES}


def tuned_phrases(summary: dict) -> dict[str, list[str]]:
    """How the gap at 4 bits grows at tuned rates, in sentences."""
    by = {m["method"]: w["D"] for m in summary["methods"] for w in m["gaps"]["widths"]}
    ste, lsq, quest = by["ste"], by["lsq"], by["quest"]
    short = [f"D^{row['value']:.2f}" for row in (ste, lsq, quest)]
    return {
        "README.md": [
            f"γ_D {interval(ste, '.2f')} straight-through, {lsq['value']:.2f} LSQ, {quest['value']:.2f} QuEST"
        ],
        "docs/studies/index.md": [
            f"γ_D {interval(ste, '.2f')}, LSQ {interval(lsq, '.2f')}, QuEST {interval(quest, '.2f')}"
        ],
        "docs/studies/training_precision.md": [
            "{} straight-through, {} LSQ, {} QuEST".format(*short)
        ],
    }


TABLES = {
    "training_precision/gaps": Table(_FULL, gaps),
    "training_precision/tuned": Table(_TUNED, tuned),
    "training_precision/tuned_gaps": Table(_TUNED, tuned_gaps),
    "training_precision/rates_gaps": Table(_RATES, tuned_gaps),
    "training_precision/growing": Table(_FULL, growing),
    "training_precision/held_out": Table(_FULL, held_out),
    "training_precision/budgets": Table(_FULL, budgets),
    "training_precision/tensors_apart": Table(_FULL, tensors_apart),
    "training_precision/served": Table(_FULL, served),
}
PHRASES = (
    Phrases(_FULL, phrases),
    Phrases(_TUNED, tuned_phrases),
    Phrases(_GENERATED, generated),
)
