"""Placeholders for arrays: using one as an array raises an error that says what to do."""

import dataclasses
from collections.abc import Callable
from typing import Any, NoReturn

import jax


class DirectRead(AttributeError, TypeError, ValueError):
    """A quantized array was used as an array: by an attribute, an operator, or a function of arrays."""


@dataclasses.dataclass(frozen=True)
class Owner:
    """The parameter that an array was stored for.  It makes no difference: all are equal.

    So layers that differ in their places alone share one compiled program.

    >>> Owner("up/kernel") == Owner("down/kernel")
    True
    """

    path: str = dataclasses.field(default="", compare=False)


def _refuse(name: str) -> Callable[..., NoReturn]:
    def method(self: Any, *args: Any, **options: Any) -> NoReturn:
        del args, options
        raise DirectRead(self.not_an_array(name))

    return method


class Opaque:
    """A base of classes with an `owner` that arrays cannot be taken for."""

    owner: Owner
    __array_ufunc__ = None  # NumPy leaves operators to us

    def not_an_array(self, use: str) -> str:
        """Returns why this cannot be used in some way, and what to do."""
        if not self.owner.path:
            return (
                f"a {type(self).__name__} is no array, and was used as one by {use}; "
                "jaxquant.dequantize gives the array that it stands for"
            )
        return (
            f"{self.owner.path} is frozen, stored in few bits, and was used as an array by {use}, which "
            "code of a quantized model or function alone can: call that, or leave the weight in float by a "
            f"rule ({self.owner.path!r}, None) before the others"
        )

    def __getattr__(self, name: str) -> Any:
        # Of an array's attributes alone, and none of those by which Python and NumPy ask what an object is.
        is_own = hasattr(type(self), name) or name in self.__dict__
        if not is_own and not name.startswith("__") and hasattr(jax.Array, name):
            raise DirectRead(self.not_an_array(f".{name}"))
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


_OPERATORS = {"add": "+", "sub": "-", "mul": "*", "matmul": "@", "truediv": "/", "floordiv": "//"}
_OPERATORS |= {"mod": "%", "pow": "**", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
for _name, _sign in _OPERATORS.items():
    for _side in ("", "r"):
        setattr(Opaque, f"__{_side}{_name}__", _refuse(f"the operator {_sign}"))
for _name in ("neg", "abs", "iter", "float", "int"):
    setattr(Opaque, f"__{_name}__", _refuse(f"__{_name}__"))
Opaque.__jax_array__ = _refuse("a function of jax")  # pyright: ignore
Opaque.__array__ = _refuse("a function of NumPy")  # pyright: ignore
