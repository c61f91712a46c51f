"""`Stored`: a parameter in few bits, as the products of a frozen model multiply it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from jaxquant.numerics.opaque import Opaque, Owner
from jaxquant.numerics.qarray import QArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stored(Opaque):
    """A parameter that is stored as what it is multiplied as, which `jaxquant.functions.freeze` makes.

    It stands in the parameter's place, and only functions of `jaxquant.functions.quantize` can use it.
    Most have one operand.  One that a model splits in three before it multiplies has three, and one that it
    joins with others none, where another of them holds all.

    Attributes:
        operands: from how each is made of the parameter, in words, to its numbers.  What differs from turn
            to turn of a scan has all turns along its first axis.
        shape: of the parameter.
        dtype: of the parameter.
        owner: its path, which errors name.
    """

    operands: Mapping[str, QArray]
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    owner: Owner = dataclasses.field(default=Owner(), metadata={"static": True}, repr=False)

    @property
    def operand(self) -> QArray:
        """The only one.

        Raises:
            ValueError: there are several, or none.
        """
        if len(self.operands) != 1:
            raise ValueError(
                f"{self.owner.path or 'the parameter'} is stored as {len(self.operands)} operands: "
                f"{', '.join(self.operands) or 'another parameter holds what it is a part of'}"
            )
        return next(iter(self.operands.values()))

    @property
    def nbytes(self) -> int:
        """Bytes that are really held, scales included."""
        return sum({id(x.qvalue): x.nbytes for x in self.operands.values()}.values())

    @property
    def bits_per_element(self) -> float:
        """Bits for each number that is multiplied."""
        sizes = {id(x.qvalue): x.size for x in self.operands.values()}
        return 8 * self.nbytes / max(1, sum(sizes.values()))

    @property
    def abstract(self) -> jax.ShapeDtypeStruct:
        """The parameter's shape and type."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype)
