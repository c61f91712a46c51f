"""Models and their quantized twins, made up, for the tests of quality."""

import numpy as np
import scipy.special
import scipy.stats

from jaxquant import quality


def twins(n=300, classes=7, noise=0.3, seed=0):
    rng = np.random.default_rng(seed)
    reference = rng.normal(size=(n, classes)).astype(np.float32) * 2
    quantized = reference + noise * rng.normal(size=reference.shape).astype(np.float32)
    labels = np.array([rng.choice(classes, p=p) for p in scipy.special.softmax(reference, -1)])
    return reference, quantized, labels


def made(correct, reference_correct, *, same=None, nll=0.0, kl=0.0, groups=None, clusters=None):
    """Examples with given outcomes, without any logits."""
    n = len(correct)
    same = np.asarray(correct == reference_correct) if same is None else same
    reference = np.where(reference_correct, 0, 1)
    prediction = np.where(correct, 0, np.where(same, reference, 2))
    ones, zeros = np.ones(n), np.zeros(n)
    return quality.Examples(
        label=np.zeros(n, np.int64),
        prediction=prediction,
        reference_prediction=reference,
        nll=zeros + nll,
        reference_nll=zeros,
        confidence=ones,
        reference_confidence=ones,
        brier=zeros,
        reference_brier=zeros,
        kl=zeros + kl,
        margin=zeros,
        covariance=ones,
        variance=ones,
        n_classes=3,
        groups=groups,
        clusters=clusters,
    )


def encoded(n=600, pairs=400, noise=0.02, seed=0):
    rng = np.random.default_rng(seed)
    reference = rng.normal(size=(n, 24)) + 0.5
    quantized = reference + noise * rng.normal(size=reference.shape)
    rows = rng.integers(0, n, (pairs, 2))
    unit = reference / np.linalg.norm(reference, axis=1, keepdims=True)
    similarity = np.sum(unit[rows[:, 0]] * unit[rows[:, 1]], 1)
    return reference, quantized, rows, np.round(4 * (similarity + 0.1 * rng.normal(size=pairs)))


REFERENCE, QUANTIZED, LABELS = twins(8)
