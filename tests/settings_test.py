"""What is noted of the types that modules compute in."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from jaxquant.artifacts import settings


class Own:
    """A module of one's own, to which a name of Flax's means something else."""

    preferred_element_type = "the one that users like"

    @property
    def dtype(self):
        raise RuntimeError("not to be asked")


def test_types_are_names_however_they_are_written():
    for dtype in (jnp.bfloat16, "bfloat16", jnp.dtype("bfloat16"), np.dtype(jnp.bfloat16)):
        for module in (nn.Dense(8, dtype=dtype), nnx.Linear(2, 3, dtype=dtype, rngs=nnx.Rngs(0))):
            assert settings.types_of(module)["dtype"] == "bfloat16"
    assert settings.types_of(nn.Dense(8))["dtype"] is None
    assert settings.types_of(nn.Dropout(0.5)) == {}
    assert settings.types_of(Own()) == {}


def test_modules_and_settings_of_one_side_are_passed_over():
    here = {"up": {"dtype": "float32"}, "only here": {"dtype": "int8"}}
    saved = {"up": {"dtype": "float32", "accumulates in": "int8"}, "only saved": {"dtype": None}}
    read = settings.types_from_array(settings.types_to_array(saved))
    assert read == saved
    settings.check_types(here, read)
    with pytest.raises(ValueError, match=r"the model has dtype float32 here, .* saved with None"):
        settings.check_types({"": {"dtype": "float32"}}, {"": {"dtype": None}})
