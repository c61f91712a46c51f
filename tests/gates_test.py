"""Verdicts: what passes, what fails, and what no verdict can rest on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quality_twins import LABELS, QUANTIZED, REFERENCE, encoded, made, twins

from jaxquant import quality

pytestmark = pytest.mark.exhaustive  # looks at our arithmetic, not at versions of others


RUNS = 400


@pytest.mark.parametrize("tier", list(quality.TIERS))
def test_a_twin_passes_and_fifty_examples_do_not(tier):
    reference, _, labels = twins(6000)
    assert quality.gate(quality.compare(reference, reference, labels), tier)
    few = quality.gate(quality.compare(reference[:50], reference[:50], labels[:50]), tier)
    assert few.status == "inconclusive"
    assert not few
    assert "50 examples do not decide" in few.reasons[0]


def test_a_broken_model_fails_and_reasons_have_figure_interval_and_bound():
    reference, _, labels = twins(2000)
    broken = quality.compare(reference, np.roll(reference, 1, axis=1), labels)
    verdict = quality.gate(broken, "99")
    assert verdict.status == "fail"
    assert verdict.tier == "99"
    retained = broken.retained_accuracy
    assert verdict.reasons[0] == (
        f"Retained accuracy is {retained.estimate:.4f} [{retained.low:.4f}, {retained.high:.4f}],"
        " to be at least 0.9900."
    )
    assert (
        quality.gate(quality.compare(reference[:50], -reference[:50], labels[:50])).status == "fail"
    )


def test_at_the_bound_a_pass_or_a_fail_is_as_rare_as_the_level_says():
    rng, counts = np.random.default_rng(4), {"pass": 0, "fail": 0, "inconclusive": 0}
    for _ in range(RUNS):  # accuracy 0.80 → 0.792, which is 99 %
        cell = np.searchsorted(np.cumsum([0.77, 0.03, 0.022]), rng.random(3000))
        report = quality.summarize(made(np.isin(cell, (0, 2)), cell < 2))
        checks = {c.name: c.status for c in quality.gate(report, "99").checks}
        counts[checks["retained accuracy"]] += 1
    for status in ("pass", "fail"):
        assert counts[status] / RUNS <= 0.05 + 2.5 * np.sqrt(0.05 * 0.95 / RUNS), counts


def test_tiers_are_ordered_and_hold_their_reference_points():
    loose, strict = quality.TIERS["99"], quality.TIERS["99.9"]
    for name in ("retained_accuracy", "agreement"):
        assert getattr(strict, name) > getattr(loose, name)
    for name in ("log_perplexity_ratio", "kl_mean", "kl_p99", "logit_gain", "group_loss"):
        assert getattr(strict, name) < getattr(loose, name)
    for kl, agreement, expected in (
        (0.00024, 0.9922, {"99": True, "99.9": True}),  # Q8_0
        (0.0047, 0.9655, {"99": True, "99.9": False}),  # Q5_K_M
        (0.051, 0.8957, {"99": False, "99.9": False}),  # Q3_K_M
    ):
        for name, tier in quality.TIERS.items():
            assert (kl <= tier.kl_mean) == expected[name]
            assert (agreement >= tier.agreement) == expected[name]


def rounded(x, axis, bits=8):
    scale = jnp.max(jnp.abs(x), axis, keepdims=True) / (2 ** (bits - 1) - 1)
    return jnp.round(x / scale) * scale


def forward(weights, x, activation=lambda h: h):
    """A residual network with norms, in which a wrong scale of one layer is easily overlooked."""
    x = x @ weights["in"]
    for up, down in weights["blocks"]:
        h = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)
        x = x + activation(jax.nn.gelu(activation(h) @ up)) @ down
    x = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)
    return activation(x) @ weights["out"]


@pytest.fixture(scope="module")
def trained():
    """A trained classifier, and 24 000 examples it has not seen."""
    keys = iter(jax.random.split(jax.random.key(0), 20))

    def normal(*shape):
        return jax.random.normal(next(keys), shape) / np.sqrt(shape[0])

    weights = {
        "in": normal(16, 32),
        "blocks": [(normal(32, 64), normal(64, 32)) for _ in range(3)],
        "out": normal(32, 10),
    }
    centers = jax.random.normal(next(keys), (10, 16)) * 0.9

    def sample(n):
        labels = jax.random.randint(next(keys), (n,), 0, 10)
        return centers[labels] + jax.random.normal(next(keys), (n, 16)), labels

    x, y = sample(4000)

    def loss(weights):
        return -jnp.mean(jax.nn.log_softmax(forward(weights, x))[jnp.arange(4000), y])

    @jax.jit
    def step(weights):
        return jax.tree.map(lambda w, g: w - 0.1 * g, weights, jax.grad(loss)(weights))

    for _ in range(100):
        weights = step(weights)
    return weights, *sample(24_000)


@pytest.mark.long
def test_honest_rounding_passes_and_one_wrong_scale_fails(trained):
    weights, x, labels = trained
    reference = forward(weights, x)
    honest_weights = jax.tree.map(lambda w: rounded(w, 0), weights)

    def report(quantized):
        logits = forward(quantized, x, lambda h: rounded(h, 1))
        return quality.compare(reference, logits, labels)

    honest = report(honest_weights)
    assert 0.7 < honest.reference.accuracy < 0.99
    assert quality.gate(honest, "99.9", baseline=honest).status == "pass"
    leaves, tree = jax.tree.flatten(honest_weights)
    for layer in range(len(leaves)):
        wrong = [leaf * jnp.float32(1.1 if i == layer else 1) for i, leaf in enumerate(leaves)]
        broken = report(jax.tree.unflatten(tree, wrong))
        verdict = quality.gate(broken, "99.9", baseline=honest)
        assert verdict.status == "fail", f"layer {layer}: {verdict}"
        failed = {check.name for check in verdict.checks if check.status == "fail"}
        assert "mean KL over the baseline's" in failed
    coarse = report(jax.tree.map(lambda w: rounded(w, 0, 3), weights))
    assert quality.gate(coarse, "99.9").status == "fail"


def test_the_gate_takes_embeddings():
    reference, quantized, rows, scores = encoded(2000, 1500)
    honest = quality.compare_embeddings(reference, quantized, rows, scores)
    assert quality.gate(honest, "99").status == "pass"
    rough = reference + 0.3 * np.random.default_rng(9).normal(size=reference.shape)
    broken = quality.compare_embeddings(reference, rough, rows, scores)
    assert quality.gate(broken, "99").status == "fail"
    slight = quality.compare_embeddings(reference, reference + 2 * (quantized - reference))
    assert quality.gate(slight, "99").status == "pass"
    assert quality.gate(slight, "99", baseline=honest).status == "fail"
    few = quality.compare_embeddings(reference[:50], reference[:50])
    assert quality.gate(few, "99").status == "inconclusive"


def test_misuse_of_the_gate_and_of_summaries():
    report = quality.compare(REFERENCE, QUANTIZED, LABELS)
    twin = quality.compare(REFERENCE, REFERENCE, LABELS)
    embedded = quality.compare_embeddings(REFERENCE, QUANTIZED)
    with pytest.raises(ValueError, match=r"tier is one of '99', '99\.9' or a Tier; got '95'"):
        quality.gate(report, "95")
    with pytest.raises(ValueError, match="takes a Report"):
        quality.gate({"accuracy": 1.0}, "99")
    with pytest.raises(ValueError, match="does not differ from its reference"):
        quality.gate(report, "99", baseline=twin)
    with pytest.raises(ValueError, match="same examples and reference"):
        quality.gate(report, "99", baseline=quality.compare(QUANTIZED, REFERENCE, LABELS))
    with pytest.raises(ValueError, match="of the report's kind"):
        quality.gate(report, "99", baseline=embedded)
    with pytest.raises(ValueError, match="no examples"):
        quality.Examples.concatenate([])
    for parts in (3, [3], None):
        with pytest.raises(ValueError, match=r"parts are a list of Examples; got"):
            quality.Examples.concatenate(parts)
    with pytest.raises(ValueError, match="Examples of per_example; got int"):
        quality.summarize(3)
    with pytest.raises(ValueError, match=r"groups have shape \(8,\); got \(3,\)"):
        quality.summarize(quality.per_example(REFERENCE, QUANTIZED, LABELS), [1, 2, 3])
