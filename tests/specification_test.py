import copy
import json

import chex
import jax
import jax.numpy as jnp
import pytest

import jaxquant as jq
from jaxquant import calibration, estimators, rounding
from jaxquant.artifacts.specification import from_config, to_config
from jaxquant.operations.recipes import RECIPES
from jaxquant.operations.smoothed import Smoothed

NAMES = [*RECIPES, "w8a8", "w4a16g128", "w3a16", "w4a4-lsq", "w4a4-quest", "a8kv8", "a4", "kv4"]
INT8 = jq.Quantizer(jq.INT8, "channel")


def calibrated(value) -> jq.DotGeneral:
    lhs = jq.Quantizer(jq.INT8, calibration=calibration.Range(value))
    return jq.DotGeneral(jq.Operands(lhs, INT8, "native"))


OPERATIONS = {
    "one range": calibrated(jnp.float32(3)),
    "low and high": calibrated((jnp.float32(-1), jnp.float32(2))),
    "a range for each layer": calibrated(jnp.arange(3.0)),
    "a Python number": calibrated(2.5),
    "a learned step": jq.Operands(jq.Quantizer(jq.INT4, calibration=calibration.Step(jnp.ones(2)))),
    "percentile": jq.Quantizer(jq.INT4, (8, 4), calibration.percentile(99.5)),
    "mse": jq.Quantizer(jq.parse("e3m4"), 16, calibration.mse(7), estimator=estimators.clipped),
    "minmax": jq.Quantizer(jq.parse("uint8"), calibration=calibration.minmax, hadamard=8),
    "pact": jq.Quantizer(jq.parse("uint4"), rounding=rounding.dithered, estimator=estimators.pact),
    "codebook": jq.Quantizer(jq.Codebook((-1.0, 0.1, 1.0))),
    "block": jq.Quantizer(jq.Block(jq.Int(3), 8, jq.FP16)),
    "smoothed": Smoothed(calibrated(jnp.float32(1)), jnp.ones((2, 4), jnp.bfloat16)),
    "smoothed in float": Smoothed(jax.lax.dot_general, jnp.ones(4)),
    "convolution": jq.ConvGeneralDilated(jq.Operands(INT8, INT8, "native"), drhs=jq.Operands()),
    "ragged": jq.RaggedDot(jq.Operands(INT8, INT8, "native")),
}


def back(operation):
    description, arrays = to_config(operation)
    return from_config(json.loads(json.dumps(description, allow_nan=False)), arrays)


@pytest.mark.parametrize("name", NAMES)
def test_named_recipes_come_back_equal(name):
    assert back(jq.recipe(name)) == jq.recipe(name)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_and_their_arrays_come_back(name):
    operation = OPERATIONS[name]
    found = back(operation)
    assert jax.tree.structure(found) == jax.tree.structure(operation)
    chex.assert_trees_all_equal(found, operation)
    types = [[jnp.result_type(x) for x in jax.tree.leaves(tree)] for tree in (found, operation)]
    assert types[0] == types[1]


def own(x, axes, format):
    return jnp.max(jnp.abs(x), axis=axes, keepdims=True)


class OwnInt(jq.Int):
    pass


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (jq.Quantizer(jq.INT4, calibration=own), r"calibration is .*specification_test\.own"),
        (jq.Quantizer(jq.INT4, rounding=lambda x, key=None: x), r"rounding is .*<lambda>"),
        (jq.DotGeneral(jq.Operands(rhs=jq.Quantizer(jq.INT4, calibration=own))), "forward.rhs.cal"),
        (jq.Quantizer(OwnInt(4)), "no name for"),
        (jq.Quantizer(jq.Int(jnp.float32(4))), "precision is an array"),
        (jq.Quantizer(jq.INT4, calibration=calibration.Range(float("inf"))), "value is inf"),
        (jq.Quantizer(jq.INT4, calibration=calibration.Range([1.0])), "builtins.list"),
        (own, "the operation is .*own, which a file has no name for.*DotGeneral.*absmax"),
        (None, "NoneType"),
    ],
)
def test_what_has_no_name_is_refused_by_name(operation, message):
    with pytest.raises(ValueError, match=message):
        to_config(operation)


def test_traced_arrays_are_refused():
    def inside(value):
        to_config(calibrated(value))
        return value

    with pytest.raises(ValueError, match=r"calibration.value is traced"):
        jax.jit(inside)(jnp.float32(1))


def changed(path, value):
    """The description of a calibrated product with one part replaced, and its arrays."""
    description, arrays = to_config(OPERATIONS["one range"])
    description = copy.deepcopy(description)
    node = description
    for key in path[:-1]:
        node = node[key]
    if value is KeyError:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return description, arrays


LHS = ("operation", "fields", "forward", "fields", "lhs", "fields")
ABSMAX = {"function": "calibration.absmax"}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), 2, "version 2; this is version 1"),
        (("version",), True, "version True"),
        (("version",), KeyError, "a version and it"),
        (("operation",), None, "of no operation"),
        (("operation", "type"), "os.system", "class 'os.system', which is not known"),
        ((*LHS, "rounding", "function"), "os.system", "function 'os.system'|one of rounding"),
        ((*LHS, "rounding"), ABSMAX, r"forward.lhs.rounding is one of rounding\.\*"),
        ((*LHS, "calibration"), {"function": "rounding.nearest"}, r"one of calibration\.\*"),
        ((*LHS, "calibration"), None, r"one of calibration\.\*"),
        ((*LHS, "calibration"), ABSMAX, r"does not refer to its arrays \[0\]"),
        ((*LHS, "calibration", "fields", "value"), {"array": 1}, "is array 1 of 1"),
        ((*LHS, "calibration", "fields", "value"), {"array": True}, "is array True"),
        ((*LHS, "calibration", "fields", "value"), {"array": 0, "x": 1}, "not understood"),
        ((*LHS, "format", "format"), "int99", "bits"),
        ((*LHS, "granularity"), "row", "granularity"),
        ((*LHS, "hadamard"), KeyError, "has the fields"),
        ((*LHS, "axis"), 1, "has the fields"),
        ((*LHS, "hadamard"), [8], "not understood"),
        (("operation", "fields", "forward"), None, "is no DotGeneral: forward is an Operands"),
    ],
)
def test_what_is_not_as_it_was_written_is_an_error(path, value, message):
    with pytest.raises(ValueError, match=message):
        from_config(*changed(path, value))
