"""Robustness to corruptions, against a reference's."""

import dataclasses
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxquant.artifacts.plain import plain
from jaxquant.quality.intervals import as_array


@dataclasses.dataclass(frozen=True)
class CorruptionReport:
    """Corruption errors as ratios to the reference's: 1 is as robust as the reference, less is better.

    Attributes:
        mean: mCE.
        relative: mCE of what corruption adds to the clean error; None without clean errors.
        by_corruption: CE of each corruption.
        relative_by_corruption: relative CE of each; None without clean errors.
    """

    mean: float
    relative: float | None
    by_corruption: dict[str, float]
    relative_by_corruption: dict[str, float] | None

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields as JSON has them."""
        return plain(self)

    def __str__(self) -> str:
        relative = "" if self.relative is None else f", relative {self.relative:.4f}"
        worst_first = sorted(self.by_corruption.items(), key=lambda item: -item[1])
        return "\n".join(
            [
                f"mean corruption error {self.mean:.4f} of the reference's{relative}",
                *(f"  {name:20} {ratio:.4f}" for name, ratio in worst_first),
            ]
        )


def corruption_error(
    errors: Mapping[str, Sequence[float]],
    reference_errors: Mapping[str, Sequence[float]],
    *,
    clean: float | None = None,
    reference_clean: float | None = None,
) -> CorruptionReport:
    """Returns mean corruption error: errors summed over severities, as a share of the reference's, averaged.

    mCE = mean_c (Σ_s E_s,c / Σ_s E_ref_s,c), and with the clean errors E and E_ref
    relative mCE = mean_c (Σ_s (E_s,c − E) / Σ_s (E_ref_s,c − E_ref)).

    Args:
        errors: error rates by corruption, one per severity.
        reference_errors: the reference's, for the same corruptions and severities.
        clean: error rate without corruption.
        reference_clean: the reference's.

    Raises:
        ValueError: no dictionaries; other corruptions or severities than the reference's, errors that are
            negative or not finite, or a reference whose errors sum to zero (relative: add nothing to the
            clean error).

    Source: Hendrycks & Dietterich 2019, arXiv 1903.12261, section 4.1.  The paper writes percent.

    >>> corruption_error({"noise": [0.25, 0.5]}, {"noise": [0.125, 0.375]}).mean
    1.5
    """
    for name, value in (("errors", errors), ("reference_errors", reference_errors)):
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} are a dictionary by corruption; got {reprlib.repr(value)}")
    if not errors or set(errors) != set(reference_errors):
        raise ValueError(
            "errors are of the reference's corruptions, at least one; got"
            f" {sorted(errors, key=str)} and {sorted(reference_errors, key=str)}"
        )
    if (clean is None) != (reference_clean is None):
        raise ValueError(
            f"clean errors are of both models or of neither; got {clean!r} and {reference_clean!r}"
        )
    ratios = {name: _ratio(name, errors[name], reference_errors[name], 0, 0) for name in errors}
    relative = None
    if clean is not None and reference_clean is not None:
        relative = {
            name: _ratio(name, errors[name], reference_errors[name], clean, reference_clean)
            for name in errors
        }
    return CorruptionReport(
        float(np.mean(list(ratios.values()))),
        None if relative is None else float(np.mean(list(relative.values()))),
        ratios,
        relative,
    )


def _ratio(
    name: str,
    errors: Sequence[float],
    reference: Sequence[float],
    clean: float,
    reference_clean: float,
) -> float:
    above, below = (as_array(f"errors of {name!r}", x, float) for x in (errors, reference))
    if above.shape != below.shape or above.ndim != 1 or not above.size:
        raise ValueError(
            f"corruption {name!r} has one error per severity in both; got {errors!r} and {reference!r}"
        )
    cleans = as_array("clean errors", [clean, reference_clean], float)
    everything = np.concatenate([above, below, cleans])
    if not np.all(np.isfinite(everything) & (everything >= 0)):
        raise ValueError(
            f"errors of {name!r} are finite and not negative; got {errors!r} and {reference!r}"
        )
    total = float(np.sum(below - reference_clean))
    if total <= 0:
        raise ValueError(
            f"the reference's errors under {name!r} sum to {total:.4g} above"
            f" {reference_clean:.4g}; a ratio needs more than zero"
        )
    return float(np.sum(above - clean)) / total
