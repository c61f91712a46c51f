"""What is measured of a model beside the reference, and what it costs by count."""

import functools
import math
import re
from typing import Any

import jax
import numpy as np
from flax import nnx

import jaxquant as jq
from experiments.qat_efficiency.tasks import Split, Task, rules

TIER = "99"
FLOAT_BITS = 16  # counted for what stays in floating point, as accelerators multiply it
_RECIPE = re.compile(r"w(\d+)a(\d+)")


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef: nnx.GraphDef, state: Any, inputs: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, state)(inputs)


def logits(model: nnx.Module, inputs: np.ndarray, batch: int) -> np.ndarray:
    """A model's logits, `batch` examples at a time: those that share the ranges of their activations."""
    graphdef, state = nnx.split(model)
    parts = [inputs[i : i + batch] for i in range(0, len(inputs), batch)]
    return np.concatenate([np.asarray(_logits(graphdef, state, part)) for part in parts])


def all_logits(model: nnx.Module, task: Task) -> dict[str, np.ndarray]:
    """Logits on the selection, on every split, and under every corruption and severity."""
    batch = task.settings.evaluation_batch
    found = {name: logits(model, split.inputs, batch) for name, split in parts(task).items()}
    return found


def parts(task: Task) -> dict[str, Split]:
    """All examples of a task by name: "selection", the splits, "CORRUPTION SEVERITY"."""
    named = {"selection": task.selection, **task.splits}
    for name, splits in task.corrupted.items():
        for severity, split in zip(task.settings.severities, splits, strict=True):
            named[f"{name} {severity}"] = split
    return named


def measure(model: nnx.Module, task: Task, reference: dict[str, np.ndarray]) -> dict:
    """A record of a model as it is served, beside the reference's logits.

    Returns:
        status "done", or "not finite" where some logit is none; bytes; the selection's scores; each
        split's comparison with the reference; errors under corruption with their ratio to the reference's.
    """
    found = all_logits(model, task)
    size = {"bytes": nbytes(model)}
    if not all(np.isfinite(x).all() for x in found.values()):
        return {"status": "not finite", **size}
    selection = jq.quality.compare(
        reference["selection"], found["selection"], task.selection.labels
    )
    return {
        "status": "done",
        **size,
        "selection": {"accuracy": selection.quantized.accuracy, "nll": selection.quantized.nll},
        "splits": {
            name: compared(reference[name], found[name], split)
            for name, split in task.splits.items()
        },
        "corruption": _corruption(task, reference, found),
    }


def compared(reference: np.ndarray, logits: np.ndarray, split: Split) -> dict:
    """A model beside its reference on a split: the figures that are kept, and the verdict."""
    report = jq.quality.compare(reference, logits, split.labels, split.groups)
    verdict = jq.quality.gate(report, TIER)
    full = report.to_dict()
    kept = ("n", "n_clusters", "quantized", "accuracy_difference", "log_perplexity_ratio", "flips")
    worst = report.worst_group
    return {name: full[name] for name in kept} | {
        "agreement": report.agreement.estimate,
        "kl": {"mean": report.kl.mean.estimate, "p99": report.kl.p99.estimate},
        "worst_group": None
        if worst is None
        else {"name": worst.name, "change": worst.change.estimate, "p_value": worst.p_value},
        "regressions": [group.name for group in report.regressions],
        "silent_regressions": [group.name for group in report.silent_regressions],
        "gate": verdict.status,
        "not_passed": {
            check.name: check.status for check in verdict.checks if check.status != "pass"
        },
    }


def _corruption(
    task: Task, reference: dict[str, np.ndarray], found: dict[str, np.ndarray]
) -> dict | None:
    """Error rates by corruption and severity, and their ratio to the reference's.

    A corruption under which the reference errs nowhere has no ratio, and is not in the mean.
    """
    if not task.corrupted:
        return None

    def errors(of: dict[str, np.ndarray]) -> dict[str, list[float]]:
        return {
            name: [
                float(np.mean(of[f"{name} {severity}"].argmax(-1) != split.labels))
                for severity, split in zip(task.settings.severities, splits, strict=True)
            ]
            for name, splits in task.corrupted.items()
        }

    own, theirs = errors(found), errors(reference)
    known = [name for name in own if sum(theirs[name]) > 0]
    ratios = None
    if known:
        ratios = jq.quality.corruption_error(
            {name: own[name] for name in known}, {name: theirs[name] for name in known}
        )
    return {
        "errors": own,
        "mean": None if ratios is None else ratios.mean,
        "by_corruption": {} if ratios is None else ratios.by_corruption,
    }


# ---------------------------------------------------------------------------------------------------
# Costs by count


def nbytes(model: nnx.Module) -> dict[str, int]:
    """Bytes that a model holds: weights of matrix products with their scales, and everything else."""
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    weights = sum(row.bytes_before for row in jq.nnx.coverage(model))
    return {"weights": weights, "rest": total - weights, "total": total}


def bit_operations(task: Task, width: str | None) -> dict[str, float]:
    """Bit operations of one example's forward pass, derived, not timed.

        Σ MACs · weight bits · activation bits

    What stays in floating point, attention's products included, counts 16 × 16 bits.  Rotations, scales
    and rounding count nothing.

    Args:
        task: whose model.
        width: the blocks'; None for the float model.
    """
    model = task.make(0)
    example = jax.ShapeDtypeStruct(
        (1, *task.selection.inputs.shape[1:]), task.selection.inputs.dtype
    )
    chosen = None if width is None else rules(task.settings.model, width)
    table = jq.nnx.coverage(model, chosen, example)
    total = sum((row.macs or 0) * math.prod(_bits(row.recipe)) for row in table)
    return {"macs": table.macs, "bit_operations": total}


def _bits(recipe: str) -> tuple[int, int]:
    match = _RECIPE.match(recipe)
    return (int(match[1]), int(match[2])) if match else (FLOAT_BITS, FLOAT_BITS)
