"""The paged store: what is written is read, and no table ever asks for more rows than there are."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.optim import pages

BITS = st.lists(st.integers(1, 8), min_size=4, max_size=4)
ROWS = 20
READ, WRITE = jax.jit(pages.read), jax.jit(pages.write)


def random_codes(bits, seed=0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (len(bits), pages.PAGE))
    codes = codes % (1 << np.array(bits))[:, None]
    return jnp.array(codes.reshape(-1, *pages.PAGE_SHAPE), jnp.uint8)


def test_a_page_is_the_transpose_of_its_bits_as_numpy_has_it():
    codes = random_codes([5, 8])
    store = pages.empty(np.array([5, 8]))
    pool = np.asarray(pages.write(store.pool, store.table, codes))
    for page, width in enumerate((5, 8)):
        eighths = np.asarray(codes[page]).reshape(8, pages.ROW)
        for j in range(width):
            expected = np.packbits((eighths >> j) & 1, axis=0, bitorder="little")[0]
            np.testing.assert_array_equal(pool[store.table[page, j]].ravel(), expected)
    assert not pool[0].any()


@pytest.mark.long
@hypothesis.given(BITS, st.data())
@hypothesis.settings(max_examples=30, deadline=None)
def test_what_is_written_is_read_through_any_changes_of_widths(bits, data):
    rows = ROWS
    hypothesis.assume(sum(bits) <= rows)
    store = pages.empty(np.array(bits), rows)
    codes = random_codes(bits)
    pool = WRITE(store.pool, store.table, codes)
    np.testing.assert_array_equal(READ(pool, store.table), codes)
    wanted = jnp.array(
        data.draw(st.lists(st.integers(1, 8), min_size=len(bits), max_size=len(bits)))
    )
    kept = pages.lowered(store.table, wanted)
    np.testing.assert_array_equal(pages.widths(kept), np.minimum(bits, wanted))
    table = pages.raised(kept, wanted, rows)
    found = np.asarray(pages.widths(table))
    assert found.sum() <= rows
    used = np.asarray(table)[np.asarray(table) > 0]
    assert len(set(used)) == len(used)
    assert used.max() <= rows
    # Bits that stay are where they were; new ones are written and read.
    np.testing.assert_array_equal(np.where(kept, table, 0), kept)
    if sum(np.maximum(found, wanted)) <= rows:
        np.testing.assert_array_equal(found, wanted)
    codes = random_codes(found, seed=1)
    np.testing.assert_array_equal(READ(WRITE(pool, table, codes), table), codes)


def test_a_change_of_widths_compiles_nothing():
    traces = []

    @jax.jit
    def change(store, bits, codes):
        traces.append(1)
        table = pages.raised(pages.lowered(store.table, bits), bits, store.rows)
        return pages.Store(pages.write(store.pool, table, codes), table)

    store = pages.empty(np.array([4, 4, 4]))
    for bits in ([4, 4, 4], [2, 8, 2], [6, 1, 5], [8, 8, 8], [1, 1, 1], [3, 4, 5]):
        store = change(store, jnp.array(bits), random_codes([1, 1, 1]))
        assert int(store.bits.sum()) <= 12
        assert store.pool.nbytes == 13 * pages.ROW
    assert len(traces) == 1
    np.testing.assert_array_equal(store.bits, [3, 4, 5])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pages.empty(np.array([9])), "bits must be from 0 to 8; got 9 to 9"),
        (lambda: pages.empty(np.array([-1, 3])), "bits must be from 0 to 8; got -1 to 3"),
        (lambda: pages.empty(np.array([2.5])), "bits must be one integer for each page"),
        (lambda: pages.empty(np.array([4, 4]), 7), "take 8 rows of 1024 bytes; the budget is 7"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_budget_of_nothing_gives_nothing():
    store = pages.empty(np.array([0, 0]))
    np.testing.assert_array_equal(pages.raised(store.table, jnp.array([1, 8]), store.rows), 0)
