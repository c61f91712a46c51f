"""Reduce two models' logits to a few figures per example; the logits can then be dropped."""

import dataclasses
import reprlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping as jt
import numpy as np

from jaxquant.quality.intervals import as_array

# Logits worked on at a time, per model: some 16 MiB in float32.
_CHUNK = 2**22
_FIGURES = (
    "prediction",
    "reference_prediction",
    "nll",
    "reference_nll",
    "confidence",
    "reference_confidence",
    "brier",
    "reference_brier",
    "kl",
    "margin",
    "covariance",
    "variance",
)


@dataclasses.dataclass(frozen=True)
class Examples:
    """The input of `summarize`: arrays of length n, made by `per_example`.

    Fields named ``reference_*`` are of the reference, those beside them of the quantized model.

    Attributes:
        label: int; the right class, or the next token.
        prediction, reference_prediction: int; the class with the largest logit.
        nll, reference_nll: −log p(label), nats.
        confidence, reference_confidence: the probability of the prediction.
        brier, reference_brier: Σ_k (p_k − [k = label])².
        kl: KL(reference ‖ quantized), nats.
        margin: the reference's largest logit less its second.
        covariance, variance: Cov_p(z_ref, z) and Var_p(z_ref) of the logits under the reference's p.
        n_classes: the number of logits.
        groups: names of groups, or None.
        clusters: which examples are correlated, integers, or None where each stands for itself.
        clusters_are_names: whether equal integers mean one cluster across parts that are concatenated.
    """

    label: np.ndarray
    prediction: np.ndarray
    reference_prediction: np.ndarray
    nll: np.ndarray
    reference_nll: np.ndarray
    confidence: np.ndarray
    reference_confidence: np.ndarray
    brier: np.ndarray
    reference_brier: np.ndarray
    kl: np.ndarray
    margin: np.ndarray
    covariance: np.ndarray
    variance: np.ndarray
    n_classes: int
    groups: np.ndarray | None = None
    clusters: np.ndarray | None = None
    clusters_are_names: bool = False

    def __len__(self) -> int:
        return len(self.label)

    @staticmethod
    def concatenate(parts: Sequence["Examples"]) -> "Examples":
        """Returns the examples of several batches as one.

        Clusters that were given keep their names; those that `per_example` numbered (one per window)
        are numbered on, so that windows of different batches stay separate.

        Raises:
            ValueError: no list of `Examples`; no parts, or parts with and without groups, clusters, or with
                other classes.

        >>> part = per_example(jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.array([0, 1]))
        >>> len(Examples.concatenate([part, part]))
        4
        """
        if not isinstance(parts, Sequence) or not all(isinstance(p, Examples) for p in parts):
            raise ValueError(f"parts are a list of Examples; got {reprlib.repr(parts)}")
        if not parts:
            raise ValueError("there are no examples: concatenate takes at least one part")
        first = parts[0]
        kinds = {(p.n_classes, p.groups is None, _cluster_kind(p)) for p in parts}
        if len(kinds) > 1:
            raise ValueError(
                "parts differ: every one has the same number of classes, and groups and clusters in"
                f" all or in none; got {sorted(map(str, kinds))}"
            )
        names = ["label", *_FIGURES] + (["groups"] if first.groups is not None else [])
        joined: dict[str, Any] = {
            name: np.concatenate([getattr(p, name) for p in parts]) for name in names
        }
        return dataclasses.replace(first, **joined, clusters=_join_clusters(parts))


def _cluster_kind(examples: Examples) -> str:
    if examples.clusters is None:
        return "no clusters"
    return "named clusters" if examples.clusters_are_names else "windows"


def _join_clusters(parts: Sequence[Examples]) -> np.ndarray | None:
    joined, offset = [], 0
    for part in parts:
        if part.clusters is None:
            return None
        joined.append(part.clusters + offset)
        if not part.clusters_are_names:
            offset += int(part.clusters.max()) + 1
    return np.concatenate(joined)


def per_example(
    reference_logits: jt.Float[jax.Array | np.ndarray, "*batch classes"],
    logits: jt.Float[jax.Array | np.ndarray, "*batch classes"],
    labels: jt.Integer[jax.Array | np.ndarray, "*batch"],
    groups: jt.Shaped[Any, "*batch"] | None = None,
    *,
    mask: jt.Bool[jax.Array | np.ndarray, "*batch"] | None = None,
    clusters: jt.Integer[jax.Array | np.ndarray, "*batch"] | None = None,
) -> Examples:
    """Returns a batch's figures, one per example (or token).

    KL(p ‖ q) is summed as Σ p (eᵈ − 1 − d) with d = log q − log p, whose terms are not negative, so that
    divergences far below float32's rounding of a logit are still positive and right.

    Args:
        reference_logits: of the reference, any leading axes.
        logits: of the quantized model on the same examples.
        labels: the right classes; under the mask, anything.
        groups: names (strings or integers) by example, for the worst group.
        mask: False where an example does not count, such as padding.
        clusters: integers that correlated examples share, such as the document of a token.  Without
            them, examples with more than one leading axis are clustered by the first (a token's window).

    Raises:
        ValueError: shapes that differ, logits that are not finite or not floating, labels out of range,
            fewer than two classes, or no examples.

    >>> figures = per_example(jnp.array([[0.0, 2.0]]), jnp.array([[0.0, 1.0]]), jnp.array([1]))
    >>> round(float(figures.kl[0]), 4), round(float(figures.margin[0]), 4)
    (0.0671, 2.0)
    """
    labels = as_array("labels", labels)
    _check_shapes(reference_logits, logits, labels)
    keep = np.ones(labels.shape, bool) if mask is None else _beside("mask", mask, labels)
    if keep.dtype != bool:
        raise ValueError(f"mask is boolean; got {keep.dtype}")
    keep = keep.reshape(-1)
    if not keep.any():
        raise ValueError(
            f"there are no examples: labels have shape {labels.shape}, of which the mask keeps none"
        )
    n_classes = logits.shape[-1]
    kept_labels = labels.reshape(-1)[keep]
    if kept_labels.min() < 0 or kept_labels.max() >= n_classes:
        raise ValueError(
            f"labels are from 0 to {n_classes - 1}; got {kept_labels.min()} to {kept_labels.max()}"
            " (mask what is padding)"
        )
    rows = _in_chunks(reference_logits, logits, np.where(keep, labels.reshape(-1), 0))
    for name in ("reference_logits", "logits"):
        bad = np.flatnonzero(keep & ~rows.pop(f"{name}_finite"))
        if len(bad):
            raise ValueError(
                f"{name} are finite; those of {len(bad)} of {keep.sum()} examples are not, the first"
                f" at {tuple(int(i) for i in np.unravel_index(bad[0], labels.shape))}"
            )
    ids = _clusters(clusters, labels)
    return Examples(
        label=kept_labels.astype(np.int64),
        **{name: rows[name][keep] for name in _FIGURES},
        n_classes=n_classes,
        groups=None if groups is None else _beside("groups", groups, labels).reshape(-1)[keep],
        clusters=None if ids is None else ids[keep],
        clusters_are_names=clusters is not None,
    )


def _check_shapes(reference_logits: Any, logits: Any, labels: np.ndarray) -> None:
    for name, array in (("reference_logits", reference_logits), ("logits", logits)):
        if not hasattr(array, "dtype") or not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"{name} are a floating array; got {getattr(array, 'dtype', type(array))}"
            )
    if reference_logits.shape != logits.shape:
        raise ValueError(
            f"both models have logits of one shape; got {reference_logits.shape} of the reference and"
            f" {logits.shape} of the quantized model"
        )
    if logits.ndim < 2 or logits.shape[-1] < 2:
        raise ValueError(
            f"logits are [..., n_classes] with two classes or more; got {logits.shape}"
        )
    if labels.shape != logits.shape[:-1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels are integers of shape {logits.shape[:-1]}; got {labels.dtype} of {labels.shape}"
        )


def _beside(name: str, values: Any, labels: np.ndarray) -> np.ndarray:
    values = as_array(name, values)
    if values.shape != labels.shape:
        raise ValueError(
            f"{name} have the labels' shape {labels.shape}, one for each example; got {values.shape}"
        )
    return values


def _clusters(clusters: Any, labels: np.ndarray) -> np.ndarray | None:
    if clusters is not None:
        clusters = _beside("clusters", clusters, labels)
        if not np.issubdtype(clusters.dtype, np.integer):
            raise ValueError(f"clusters are integers; got {clusters.dtype}")
        return clusters.reshape(-1).astype(np.int64)
    if labels.ndim < 2:
        return None
    return np.repeat(np.arange(labels.shape[0]), labels[0].size)


def _in_chunks(reference_logits: Any, logits: Any, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Computes figures by name in chunks; the last chunk overlaps another, so one shape compiles."""
    n, n_classes = labels.size, logits.shape[-1]
    rows = min(max(1, _CHUNK // n_classes), n)
    flat = [array.reshape(n, n_classes) for array in (reference_logits, logits)]
    labels = labels.astype(np.int32)
    parts: list[dict[str, np.ndarray]] = []
    for start in range(0, n, rows):
        first = min(start, n - rows)
        pair = [_rows(array, first, rows) for array in flat]
        figures = _figures(*pair, jnp.asarray(labels[first : first + rows]))
        parts.append({name: np.asarray(v)[start - first :] for name, v in figures.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _rows(array: jax.Array | np.ndarray, first: int, rows: int) -> jax.Array:
    """Returns rows from `first`; on the device without a compilation for each place."""
    if isinstance(array, np.ndarray):
        return jnp.asarray(array[first : first + rows])
    return jax.lax.dynamic_slice_in_dim(array, first, rows)


@jax.jit
def _figures(reference: jax.Array, logits: jax.Array, label: jax.Array) -> dict[str, jax.Array]:
    reference, logits = reference.astype(jnp.float32), logits.astype(jnp.float32)
    log_p, log_q = jax.nn.log_softmax(reference), jax.nn.log_softmax(logits)
    figures = {f"reference_{k}": v for k, v in _one_model(reference, log_p, label).items()}
    figures |= _one_model(logits, log_q, label)
    p, d = jnp.exp(log_p), log_q - log_p
    # eᵈ overflows where the reference is certain of what the other is not; there q − p − p·d is safe.
    small = jnp.abs(d) < 1
    near = p * (jnp.expm1(jnp.where(small, d, 0)) - d)
    figures["kl"] = jnp.sum(jnp.where(small, near, jnp.exp(log_q) - p - p * d), axis=-1)
    best = figures["reference_prediction"][:, None] == jnp.arange(logits.shape[-1])[None]
    second = jnp.max(jnp.where(best, -jnp.inf, reference), axis=-1)
    figures["margin"] = jnp.max(reference, axis=-1) - second
    centered = log_p - jnp.sum(p * log_p, axis=-1, keepdims=True)
    figures["covariance"] = jnp.sum(p * centered * log_q, axis=-1)
    figures["variance"] = jnp.sum(p * centered * log_p, axis=-1)
    figures["reference_logits_finite"] = jnp.all(jnp.isfinite(reference), axis=-1)
    figures["logits_finite"] = jnp.all(jnp.isfinite(logits), axis=-1)
    return figures


def _one_model(logits: jax.Array, log_p: jax.Array, label: jax.Array) -> dict[str, jax.Array]:
    log_label = jnp.take_along_axis(log_p, label[:, None], axis=-1)[:, 0]
    p = jnp.exp(log_p)
    return {
        "prediction": jnp.argmax(logits, axis=-1).astype(jnp.int32),
        "nll": -log_label,
        "confidence": jnp.max(p, axis=-1),
        "brier": jnp.sum(p * p, axis=-1) - 2 * jnp.exp(log_label) + 1,
    }
