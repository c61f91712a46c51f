"""Recipes: the usual quantized products by name."""

import re
from types import MappingProxyType
from typing import Any

import jax

from jaxquant.formats import E4M3, E5M2, INT8, MXFP4, MXFP6, MXFP8, NF4, NVFP4, Block, Int
from jaxquant.numerics import calibration, estimators, rounding
from jaxquant.numerics.quantizer import Quantizer
from jaxquant.operations import training
from jaxquant.operations.attention import Attention
from jaxquant.operations.dot import DotGeneral
from jaxquant.operations.operands import Operands

_NAME = re.compile(r"w([1-9][0-9]*)a([1-9][0-9]*)(?:g([1-9][0-9]*))?(?:-(lsq|quest|token))?")
_ATTENTION = re.compile(r"(?=.)(?:a([1-9][0-9]*))?(?:kv([1-9][0-9]*))?")
_EDEN = re.compile(r"nvfp4_eden_train-h(16|32|64)")
_FLOAT_BITS = 16


def _both(quantizer: Quantizer) -> DotGeneral:
    """Returns a recipe that simulates one quantizer for both operands of the forward product."""
    return DotGeneral(Operands(quantizer, quantizer))


_INT8 = Quantizer(INT8, "channel")
_INT8_GRADIENT = Quantizer(INT8, "channel", rounding=rounding.stochastic)


def _quest(bits: int) -> Quantizer:
    return Quantizer(
        Int(bits, "midrise"),
        "channel",
        calibration.gaussian,
        estimator=estimators.trust,
        hadamard=32,
    )


def _lsq(bits: int, granularity: Any) -> Quantizer:
    return Quantizer(Int(bits), granularity, calibration.learned, estimator=estimators.lsq)


# Values, each documented; `recipe` looks here first.
RECIPES = MappingProxyType(
    {
        # int8 × int8 in the forward product and in both gradients.  Operands per channel (a scale for
        # each row of activations and each column of weights), gradients rounded stochastically; the
        # gradients' products use the forward's stored integers again.
        "int8_train": DotGeneral(
            Operands(_INT8, _INT8, "native"),
            Operands(_INT8_GRADIENT, None, "native"),
            Operands(_INT8_GRADIENT, None, "native"),
        ),
        # E4M3 × E4M3 forward and E5M2 gradients, a scale per tensor, rounded to nearest (Micikevicius et al.
        # 2022, arXiv 2209.05433).
        "fp8_train": DotGeneral(
            Operands(Quantizer(E4M3), Quantizer(E4M3), "native"),
            Operands(Quantizer(E5M2), None, "native"),
            Operands(Quantizer(E5M2), None, "native"),
        ),
        # The same with ranges by the largest magnitudes of the last 1,024 steps (TransformerEngine).
        "fp8_delayed_train": training.fp8_delayed(),
        # OCP MX blocks of 32 with power-of-two scales, along what each product sums over; the forward
        # product alone.  Simulated: their values are exact in bfloat16.
        "mxfp8": _both(Quantizer(MXFP8)),
        "mxfp6": _both(Quantizer(MXFP6)),
        "mxfp4": _both(Quantizer(MXFP4)),
        # All three products in MXFP8 blocks, with scales rounded up (Mishra et al. 2025, arXiv 2506.08027),
        # and with OCP's scales, rounded down (Rouhani et al. 2023, arXiv 2310.10537).
        "mxfp8_train": training.mxfp8(),
        "mxfp8_ocp_train": training.mxfp8(training.MXFP8_OCP),
        # FP4 in all three products: NVIDIA's (2509.25149), Quartet (2505.14669), Quartet II (2601.22813).
        "nvfp4_train": training.nvfp4(),
        "mxfp4_train": training.mxfp4_quartet(),
        "nvfp4_eden_train": training.nvfp4_eden(),
        # Blocks of 16 with E4M3 scales below one for the tensor (NVIDIA 2025, arXiv 2509.25149).
        "nvfp4": _both(Quantizer(NVFP4)),
        # Weights alone, in blocks of 64 on the NF4 codebook (Dettmers et al. 2023, arXiv 2305.14314).
        "nf4": DotGeneral(Operands(None, Quantizer(NF4, 64), "native")),
        # The same with scales in E4M3 below one for the tensor: 4.125 bits a weight.
        "nf4dq": DotGeneral(Operands(None, Quantizer(Block(NF4, 64, E4M3, 2)), "native")),
        # Weights and activations rotated by a Hadamard matrix, on the grid that is best for normals,
        # with the trust mask (QuEST, Panferov et al. 2025, arXiv 2502.05003), at 4 bits.
        "quest4": _both(_quest(4)),
    }
)


def recipe(name: str) -> Any:
    """Returns a ready `DotGeneral`, or for attention a ready `Attention`, from its name.

    One of `RECIPES`, or

    - ``w{weight bits}a{activation bits}[g{block size}]``: weights per channel, or in blocks along the
      contracting axis where ``g`` says so; activations per tensor; both on symmetric integer grids with
      absmax ranges, rounded to nearest; gradients in floating point.  16 bits means left in floating point.
      ``w8a8`` and below without blocks multiply integers, weight-only ones (``a16``) hold integers and
      multiply in the activations' type; activations with blocked weights are simulated.
    - the same with ``-lsq``: step sizes are parameters that learn with the weights (`jq.nnx.quantize` makes
      them); simulated.
    - the same with ``-quest``: both operands in Hadamard coordinates of 32 with QuEST's grid and trust mask;
      simulated.
    - the same with ``-token``: activations with a scale for each token instead of one for the tensor.
    - ``nvfp4_eden_train-h{16, 32 or 64}``: with blocks of the rotation that divide smaller layers.
    - ``a{bits}``, ``kv{bits}``, ``a{bits}kv{bits}``: for attention.  ``a``: both of its products, a scale for
      each token's and head's vector and for each row of probabilities, on integers.  ``kv``: keys and values
      as a cache of so many bits holds them.

    Args:
        name: such as ``"int8_train"``, ``"w8a8"``, ``"w4a16g128"``, ``"w4a4-lsq"``, ``"kv8"``.

    Raises:
        ValueError: another name, or a width that is not 2 to 8 or 16.

    Source: Kumar et al. 2024, arXiv 2411.04330, section 2.1, for the granularities; Esser et al. 2020, arXiv
    1902.08153, for LSQ; Panferov et al. 2025, arXiv 2502.05003, for QuEST.

    >>> recipe("w8a8").forward.arithmetic, recipe("w4a16g128").forward.rhs.granularity
    ('native', 128)
    """
    if isinstance(name, str) and name in RECIPES:
        return RECIPES[name]
    if isinstance(name, str) and (match := _EDEN.fullmatch(name)):
        return training.nvfp4_eden(int(match[1]))
    if match := _ATTENTION.fullmatch(name) if isinstance(name, str) else None:
        return _attention(name, *(None if b is None else int(b) for b in match.groups()))
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise ValueError(
            f"a recipe is one of {', '.join(RECIPES)}, or named w{{bits}}a{{bits}}, as 'w8a8', 'w4a16', "
            f"'w4a16g128' or 'w4a4-lsq', or for attention as 'a8' and 'kv8'; got {name!r}"
        )
    weight_bits, activation_bits = _width(name, match[1]), _width(name, match[2])
    if match[3] and weight_bits == _FLOAT_BITS:
        raise ValueError(f"recipe {name!r}: a block size needs quantized weights")
    if match[4] in ("lsq", "quest"):
        return _trained(name, weight_bits, activation_bits, match[3], match[4])
    granularity = int(match[3]) if match[3] else "channel"
    if match[4] and activation_bits == _FLOAT_BITS:
        raise ValueError(f"recipe {name!r}: -token is about activations, which a16 leaves in float")
    whose = "channel" if match[4] else "tensor"
    lhs = None if activation_bits == _FLOAT_BITS else Quantizer(Int(activation_bits), whose)
    rhs = None if weight_bits == _FLOAT_BITS else Quantizer(Int(weight_bits), granularity)
    native = rhs is not None and (lhs is None or granularity == "channel")
    return DotGeneral(Operands(lhs, rhs, "native" if native else "simulated"))


def _width(name: str, digits: str) -> int:
    bits = int(digits)
    if bits != _FLOAT_BITS and not 2 <= bits <= 8:
        raise ValueError(
            f"recipe {name!r}: widths are 2 to 8, or 16 for floating point; got {bits}"
        )
    return bits


def _trained(name: str, weight_bits: int, activation_bits: int, block: Any, how: str) -> DotGeneral:
    """Returns a recipe that is made for training: LSQ or QuEST."""
    if block:
        raise ValueError(f"recipe {name!r}: -{how} quantizes per channel and takes no block size")
    if weight_bits == activation_bits == _FLOAT_BITS:
        raise ValueError(f"recipe {name!r}: -{how} needs something to quantize")

    def quantizer(bits: int, granularity: str) -> Quantizer | None:
        if bits == _FLOAT_BITS:
            return None
        return _quest(bits) if how == "quest" else _lsq(bits, granularity)

    return DotGeneral(
        Operands(quantizer(activation_bits, "tensor"), quantizer(weight_bits, "channel"))
    )


def _attention(name: str, bits: int | None, cache_bits: int | None) -> Attention:
    for width in (bits, cache_bits):
        if width is not None and not 2 <= width <= 8:
            raise ValueError(f"recipe {name!r}: widths are 2 to 8; got {width}")
    qk = pv = None
    if bits is not None:
        vectors = Quantizer(Int(bits), "channel")
        # Probabilities are not negative, so the whole grid is theirs.
        rows = Quantizer(Int(bits, "unsigned"), "channel")
        qk = DotGeneral(Operands(vectors, vectors, "native"))
        pv = DotGeneral(Operands(rows, vectors, "native"))
    kv = None if cache_bits is None else Quantizer(Int(cache_bits), "channel")
    return Attention(qk, pv, kv)


def describe(value: DotGeneral | Attention | None) -> str:
    """Returns a recipe in a few words: its name where it has one.

    >>> describe(RECIPES["nf4"]), describe(DotGeneral(Operands(rhs=Quantizer(Int(3), 16))))
    ('nf4', 'float × int3/16 simulated')
    """
    if value is None:
        return "float"
    for name, known in RECIPES.items():
        if not jax.tree.leaves(value) and value == known:
            return name
    if isinstance(value, Attention):
        parts = (("qk", value.qk), ("pv", value.pv))
        words = [f"{name} {describe(dot)}" for name, dot in parts if dot is not None]
        words += [] if value.kv is None else [f"kv {_describe_quantizer(value.kv)}"]
        return ", ".join(words) or "float"
    forward = value.forward
    sides = " × ".join(map(_describe_quantizer, (forward.lhs, forward.rhs)))
    gradients = "" if value.dlhs is value.drhs is None else ", gradients quantized"
    return f"{sides} {forward.arithmetic}{gradients}"


def _describe_quantizer(quantizer: Quantizer | None) -> str:
    if quantizer is None:
        return "float"
    traced = bool(jax.tree.leaves(quantizer.format))
    text = f"{type(quantizer.format).__name__}(traced)" if traced else str(quantizer.format)
    granularity = "" if isinstance(quantizer.format, Block) else f"/{quantizer.granularity}"
    return text + granularity
