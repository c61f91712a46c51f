import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.operations.einsum import einsum

SIZES = {"a": 2, "b": 3, "c": 4, "d": 5, "e": 2, "f": 3}
RNG = np.random.default_rng(0)
# How many labels are batch, contracting, lhs's free and rhs's free.
PARTS = [
    (1, 1, 1, 1),
    (2, 1, 1, 1),
    (0, 2, 1, 1),
    (0, 1, 2, 0),
    (1, 2, 0, 2),
    (2, 0, 1, 1),
    (0, 0, 2, 1),
]


def operand(labels: str) -> jax.Array:
    return jnp.array(RNG.normal(size=[SIZES[x] for x in labels]), jnp.float32)


@st.composite
def summations(draw):
    """Labels of lhs, rhs and the output, each label batch, contracting or free."""
    labels = draw(st.permutations("abcdef"))
    n = draw(st.sampled_from(PARTS))
    ends = np.cumsum([0, *n])
    batch, summed, left, right = ("".join(labels[i:j]) for i, j in itertools.pairwise(ends))
    shuffled = lambda x: "".join(draw(st.permutations(x)))  # noqa: E731
    return tuple(
        map(shuffled, (batch + summed + left, batch + summed + right, batch + left + right))
    )


@pytest.mark.long
@hypothesis.given(summations())
@hypothesis.settings(max_examples=8, deadline=None)
def test_equals_jnp_and_the_quantized_product_on_moved_axes(terms):
    left, right, out = terms
    lhs, rhs = operand(left), operand(right)
    subscripts = f"{left}, {right} -> {out}"
    expected = np.einsum(subscripts, lhs, rhs)
    found = einsum(subscripts, lhs, rhs, jax.lax.dot_general, "highest")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)

    batch = sorted(set(left) & set(right) & set(out))
    summed = sorted((set(left) & set(right)) - set(out))
    free = [[x for x in term if x not in batch + summed] for term in (left, right)]
    moved = jnp.transpose(lhs, [left.index(x) for x in (*batch, *free[0], *summed)])
    other = jnp.transpose(rhs, [right.index(x) for x in (*batch, *summed, *free[1])])
    n, m, k = len(batch), len(free[0]), len(summed)
    space = tuple(range(n))
    dims = ((tuple(range(n + m, n + m + k)), tuple(range(n, n + k))), (space, space))
    dot = jq.DotGeneral(jq.Operands(*[jq.Quantizer(jq.INT8, "channel")] * 2, "native"))
    order = (*batch, *free[0], *free[1])
    expected = np.transpose(
        jax.jit(lambda x, y: dot(x, y, dims))(moved, other), [order.index(x) for x in out]
    )
    found = jax.jit(lambda x, y: einsum(subscripts, x, y, dot))(lhs, rhs)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("subscripts", "left", "right"),
    [
        ("ab,bc", "ab", "bc"),
        ("ca,ab", "ca", "ab"),
        ("...a,...ab->...b", "cda", "cdab"),
        ("...a,ab->...b", "cda", "ab"),
        ("...a,ab", "cda", "ab"),
        ("ab...,bc->c...a", "abde", "bc"),
        ("a,a->", "a", "a"),
        ("a,b", "a", "b"),
        ("...,...", "a", "a"),
    ],
)
def test_implicit_outputs_and_ellipses_are_numpys(subscripts, left, right):
    lhs, rhs = operand(left), operand(right)
    found = einsum(subscripts, lhs, rhs)
    np.testing.assert_allclose(found, np.einsum(subscripts, lhs, rhs), rtol=1e-5, atol=1e-5)


def test_operands_keep_their_sides():
    # jnp.einsum swaps these two; the weight-only recipe must round the right one alone.
    lhs, rhs = operand("ab"), operand("bc")
    dot, weights = jq.recipe("w4a16"), jq.Quantizer(jq.INT4, "channel")
    for subscripts in ("ab,bc->ac", "ab,bc->ca"):
        expected = np.einsum(subscripts, lhs, jq.fake_quant(rhs, weights, 0))
        np.testing.assert_allclose(
            einsum(subscripts, lhs, rhs, dot), expected, rtol=1e-5, atol=1e-5
        )


def test_stored_operands_and_options():
    lhs, rhs = operand("ab"), operand("bc")
    stored = jq.quantize(rhs, jq.Quantizer(jq.INT8, "channel"), 0)
    dot = jq.recipe("w8a8")
    expected = dot(lhs, rhs, (((1,), (0,)), ((), ())))
    np.testing.assert_array_equal(einsum("ab,bc->ac", lhs, stored, dot), expected)
    found = einsum("ab,bc->ac", lhs, rhs, dot, preferred_element_type=jnp.bfloat16)
    assert found.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("subscripts", "shapes", "message"),
    [
        ("ab->a", [(2, 3), (3,)], "two operands.*name 1"),
        ("ab,bc,cd", [(2, 3), (3,)], "name 3"),
        ("ab,b->a", [(2, 3, 4), (3,)], "'ab'.*labels 2 axes.*has 3"),
        ("ab...,b->a", [(2,), (3,)], "labels 2 axes.*has 1"),
        ("ab,bc->a", [(2, 3), (3, 4)], "'c'.*only in rhs"),
        ("ab,b->", [(2, 3), (3,)], "'a'.*only in lhs"),
        ("aa,a->a", [(2, 2), (2,)], "'a' occurs twice in lhs"),
        ("ab,b->aa", [(2, 3), (3,)], "'a' occurs twice in the output"),
        ("ab,b->ac", [(2, 3), (3,)], "'c' is put out"),
        ("ab,b->a", [(2, 3), (4,)], "'b'.*size 3 in lhs and 4 in rhs"),
        ("a1,b->a", [(2, 3), (4,)], "letters.*'1'"),
        ("a......,b->a", [(2, 3), (4,)], r"one ellipsis.*'\.'"),
        ("...a,...a->...", [(2, 3, 4), (3, 4)], "2 axes of lhs and 1 of rhs"),
        ("...a,a->", [(2, 4), (4,)], r"'\.\.\.0'.*only in lhs"),
        ("a,a->...", [(2,), (2,)], "no operand has an ellipsis"),
        (7, [(2,), (2,)], "string.*7"),
    ],
)
def test_misuse_is_named(subscripts, shapes, message):
    with pytest.raises(ValueError, match=message):
        einsum(subscripts, *map(jnp.ones, shapes))


def test_the_product_is_a_callable():
    with pytest.raises(ValueError, match=r"callable.*recipe\('w8a8'\).*'w8a8'"):
        einsum("a,a", jnp.ones(2), jnp.ones(2), "w8a8")
