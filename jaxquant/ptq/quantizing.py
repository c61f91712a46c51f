"""Post-training quantization of a whole model, layer after layer, from a few batches of its inputs."""

import dataclasses
import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm.auto import tqdm

from jaxquant import files, storage
from jaxquant.batches import checked, fitting
from jaxquant.nnx.converting import from_slots
from jaxquant.nnx.freezing import (
    check_tied,
    check_weight,
    packed,
    quantize_weight,
    share,
    shared_copy,
    store,
    tied,
    weight_quantizer,
)
from jaxquant.nnx.modules import is_learned, operation_of, read, with_forward
from jaxquant.nnx.observing import observe
from jaxquant.nnx.sites import Site, as_kind, put, sites
from jaxquant.nnx.slots import find_uses
from jaxquant.nnx.slots import quantize as apply_rules
from jaxquant.ptq.identity import difference, identity
from jaxquant.ptq.smooth import awq_scale, rescaled, smoothquant_scale
from jaxquant.ptq.solvers import Statistics, gptq, rtn, statistics, update
from jaxquant.qarray import QArray
from jaxquant.quantizer import Quantizer
from jaxquant.rules import ATTENTION, Rules
from jaxquant.smoothed import Smoothed, multiplied
from jaxquant.stacking import Stacking

Model = TypeVar("Model", bound=nnx.Module)
Batches = Sequence[Any] | Callable[[], Iterable[Any]]

METHODS = ("rtn", "gptq", "awq", "smoothquant", "hadamard")
_LARGEST_ROTATION = 512


def quantize(
    model: Model,
    rules: Rules,
    batches: Batches,
    method: str = "gptq",
    *,
    memory: int = 2**24,
    call: Callable[..., Any] | None = None,
    workdir: str | os.PathLike | None = None,
    progress: bool = True,
) -> Model:
    """The model frozen, its weights rounded with regard to the inputs that each layer gets.

    Layers are taken in the order in which they are called, as many at once as their statistics fit into
    `memory`; each sees its inputs as the layers quantized before it leave them.  A batch's activations are
    gone with the batch.

    The method is one of these, or several joined by ``+``, as in ``"hadamard+gptq"``:

    - ``"rtn"``: round to nearest; inputs are not looked at.
    - ``"gptq"``: rounding that makes up for its errors (`solvers.gptq`).
    - ``"awq"``: channels scaled by what they carry (`smooth.awq_scale`).
    - ``"smoothquant"``: channels scaled so that weights and activations are alike hard
      (`smooth.smoothquant_scale`).
    - ``"hadamard"``: weights, and activations where they are quantized, in rotated coordinates.  It spreads
      single large channels, and gathers a common mean, as behind a ReLU, in one coordinate: those layers are
      better left to another method.

    Scales of channels and rotations are for Linear, LinearGeneral and Einsum; convolutions have neither, and
    an Embed is rounded to nearest whatever the method, since a row is both looked up and multiplied.

    Args:
        model: an NNX model in floating point, which stays as it is.
        rules: as of `jaxquant.nnx.quantize`.
        batches: a list of inputs, each an array or a tuple of arguments; or a function that starts such a
            series from its beginning, since it is gone through several times.
        method: as above.
        memory: bytes of statistics held at once; n² · 4 for a layer of n inputs.  Fewer means more passes,
            and layers that see more of what those before them became, which at few bits is worth it.
        call: from (model, *batch); the model's own call where not given.
        workdir: a folder in which finished layers are kept, so that the same call goes on where it stopped.
            `call` is known by its code and what it closes over, or by its string ``fingerprint``.
        progress: whether a bar is shown.

    Returns:
        A frozen model, as of `jaxquant.nnx.freeze`.

    Raises:
        ValueError: whatever `jaxquant.nnx.quantize` refuses; an unknown method, or two that scale channels;
            no batches, or one with a NaN; recipes with learned steps or traced widths; a workdir of
            another model, method, data, call or other rules, or a call whose content cannot be told.

    >>> model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    >>> batches = [jax.random.normal(jax.random.key(i), (32, 64)) for i in range(2)]
    >>> frozen = quantize(model, {".*": "w3a16"}, batches, progress=False)
    >>> read(frozen.kernel).bits_per_element
    3.5
    """
    chosen = _parse(method)
    check_batches(batches)
    if isinstance(memory, bool) or not isinstance(memory, int | np.integer) or memory < 1:
        raise ValueError(f"memory is a number of bytes, at least 1; got {memory!r}")
    if workdir is not None and not isinstance(workdir, str | os.PathLike):
        raise ValueError(f"workdir is a folder; got {workdir!r}")
    quantized = apply_rules(model, rules)
    groups = [group for group in tied(quantized) if any(map(weight_quantizer, group))]
    target = {
        path: site
        for path, site in sites(quantized).items()
        if site.kind == ATTENTION or operation_of(site.operation) is not None
    }
    working = shared_copy(model)
    found = sites(working)
    solvable = [path for path, site in target.items() if _quantizer(site) is not None]
    if not solvable:
        raise ValueError("the rules quantize no weights")
    check_tied(quantized, groups)
    for group in groups:
        _check_shared(group, chosen, method)
    for path in solvable:
        _check_recipe(target[path])
        check_weight(path, read(target[path].variable))
        if _needs_statistics(target[path], chosen):
            _check_dense(target[path], method)
        if "hadamard" in chosen:
            _rotate(target[path])
    store_ = _Store(workdir, lambda: _identities(model, target, batches, method, call))
    order = _call_order(model, batches, call, solvable)
    with tqdm(total=len(order), disable=not progress, desc=f"quantizing by {method}") as bar:
        for stage in _stages([target[p] for p in order], memory, chosen):
            paths = [site.path for site in stage]
            store_.enter(paths)
            solved = store_.read(paths)
            if solved is None:
                seen = _statistics(working, stage, batches, chosen, call)
                solved = {p: _solve(target[p], seen.get(p), chosen) for p in paths}
                store_.write(paths, solved)
            for path in paths:
                _finish(found[path], target[path], solved[path])
                bar.update(1)
    for path, site in target.items():
        if path not in solvable:
            put(found[path], site.operation)
    for group in groups:
        share([found[site.path] for site in group])
    return from_slots(model, working)


# ---------------------------------------------------------------------------------------------------
# What was asked for


def _parse(method: Any) -> frozenset[str]:
    parts = method.split("+") if isinstance(method, str) else [method]
    for part in parts:
        if part not in METHODS:
            raise ValueError(
                f"method is one of {', '.join(METHODS)}, or several joined by +; got {method!r}"
            )
    if len(set(parts)) < len(parts):
        raise ValueError(f"method names each part once; got {method!r}")
    if {"awq", "smoothquant"} <= set(parts):
        raise ValueError(f"awq and smoothquant both scale channels; choose one; got {method!r}")
    if {"rtn", "gptq"} <= set(parts):
        raise ValueError(f"rtn and gptq both round; choose one; got {method!r}")
    return frozenset(parts)


def check_batches(batches: Any) -> None:
    is_series = hasattr(batches, "__len__") and hasattr(batches, "__iter__")
    if not callable(batches) and (not is_series or isinstance(batches, str | bytes)):
        raise ValueError(
            "batches are gone through several times: give a list, or a function that starts them anew; "
            f"got {type(batches).__name__}"
        )


def series(batches: Any) -> Iterable[Any]:
    """The batches from their beginning."""
    started: Any = batches() if callable(batches) else batches
    return started


def _quantizer(site: Site) -> Quantizer | None:
    return None if site.kind == ATTENTION else operation_of(site.operation).forward.rhs


def _check_recipe(site: Site) -> None:
    forward = operation_of(site.operation).forward
    for quantizer in (forward.lhs, forward.rhs):
        if is_learned(quantizer):
            raise ValueError(
                f"{site.path} has a recipe with learned steps, which only training finds"
            )
    if jax.tree.leaves(forward.rhs.format):
        raise ValueError(f"{site.path} has a traced width, which cannot be stored")


def _check_dense(site: Site, method: str) -> None:
    """Raises a ValueError for a layer that is no one matrix of all its inputs, which solvers need."""
    module = site.module
    found = None
    if isinstance(module, nnx.LinearGeneral) and len(module.batch_axis):
        found = "batch axes"
    elif getattr(module, "mask", None) is not None:
        found = "a mask"
    elif (groups := getattr(module, "feature_group_count", 1)) != 1:
        found = f"feature_group_count {groups} (a grouped convolution)"
    if found is not None:
        raise ValueError(
            f"{site.path or 'the model'} has {found}, which method {method!r} does not take; method 'rtn' "
            f"does, and a rule ('{site.path}', None) before the others leaves the layer in float"
        )


def _check_shared(group: Sequence[Site], chosen: frozenset[str], method: str) -> None:
    """Raises a ValueError for a weight of several layers, each of which would have it rounded otherwise."""
    if len(group) > 1 and (
        chosen & {"hadamard"} or any(_needs_statistics(s, chosen) for s in group)
    ):
        raise ValueError(
            f"{' and '.join(site.path for site in group)} share one weight, and method {method!r} rounds for "
            "one layer's inputs; method 'rtn' takes it, and a rule with None for each leaves it in float"
        )


def _rotate(site: Site) -> None:
    """Puts a layer's product into Hadamard coordinates, in the largest blocks that divide its inputs."""
    if site.kind not in ("linear", "einsum"):
        return
    size = site.stacking.own(read(site.variable).shape)[site.axes[-1]]
    forward = operation_of(site.operation).forward
    if not isinstance(forward.rhs.granularity, str):
        size = math.gcd(
            size, forward.rhs.granularity if isinstance(forward.rhs.granularity, int) else 1
        )
    block = math.gcd(size, _LARGEST_ROTATION)
    if block == 1:
        raise ValueError(
            f"{site.path} cannot be rotated: its {size} inputs are not divided by any power of two"
        )

    def rotated(quantizer: Quantizer | None) -> Quantizer | None:
        return None if quantizer is None else dataclasses.replace(quantizer, hadamard=block)

    changed = dataclasses.replace(forward, lhs=rotated(forward.lhs), rhs=rotated(forward.rhs))
    put(site, with_forward(site.operation, changed))


def _call_order(model: Any, batches: Any, call: Any, paths: Sequence[str]) -> list[str]:
    """The layers as they are called; those that are not, last."""
    index, arguments = next(checked(series(batches)))
    with fitting(index, arguments):
        shapes = jax.eval_shape(lambda x: x, arguments)
        called = list(find_uses(model, *shapes, call=call)[0])
    return sorted(paths, key=lambda p: called.index(p) if p in called else len(called))


def _stages(ordered: Sequence[Site], memory: int, chosen: frozenset[str]) -> list[list[Site]]:
    """Neighbours whose statistics fit into memory together."""
    stages: list[list[Site]] = [[]]
    held = 0
    for site in ordered:
        size = _statistics_bytes(site) if _needs_statistics(site, chosen) else 0
        if stages[-1] and held + size > memory:
            stages.append([])
            held = 0
        stages[-1].append(site)
        held += size
    return stages


def _needs_statistics(site: Site, chosen: frozenset[str]) -> bool:
    return site.kind != "embed" and bool(chosen - {"rtn", "hadamard"})


def _statistics_bytes(site: Site) -> int:
    n = _inputs(site)
    return 4 * n * (n + 2) * math.prod(site.stacking.sizes)


def _inputs(site: Site) -> int:
    """How many numbers one layer's products sum over."""
    own = site.stacking.own(read(site.variable).shape)
    return math.prod(own[a] for a in site.axes)


def _statistics(
    model: nnx.Module, stage: Sequence[Site], batches: Any, chosen: frozenset[str], call: Any
) -> dict[str, Statistics]:
    wanted = {site.path for site in stage if _needs_statistics(site, chosen)}
    if not wanted:
        return {}
    hessian = bool(chosen & {"gptq", "awq"})

    def statistic(site: Site) -> Any:
        if site.path not in wanted:
            return None
        start = statistics(_inputs(site), hessian)
        return start, lambda state, seen: update(state, seen.columns())

    found = observe(model, series(batches), statistic, call)
    for path, state in found.items():
        if int(jnp.sum(state.nonfinite)):
            raise ValueError(f"the inputs of {path} hold a NaN or an Inf on the calibration data")
        if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state)):
            raise ValueError(
                f"the inputs of {path} are so large on the calibration data that sums of their squares are"
                " beyond float32"
            )
        if int(jnp.min(state.count)) == 0:
            raise ValueError(
                f"{path} is not called on the calibration data; a rule ('{path}', None) leaves it in float"
            )
    return found


# ---------------------------------------------------------------------------------------------------
# Solving a layer


def _solve(site: Site, state: Statistics | None, chosen: frozenset[str]) -> dict[str, Any]:
    """A layer's stored weight, and the scales of its channels where it has such."""
    quantizer = _quantizer(site)
    assert quantizer is not None
    if state is None:
        return {"weight": quantize_weight(site, quantizer)}
    matrix = _Matrix.of(site)
    weight = matrix.flat(read(site.variable), site.module.dtype)
    scales = {}
    is_linear = site.kind in ("linear", "einsum")

    def each(f: Callable[..., Any], *arguments: Any) -> Any:
        for _ in matrix.stacking.axes:
            f = jax.vmap(f)
        return f(*arguments)

    if is_linear and chosen & {"awq", "smoothquant"}:
        scale = each(
            (lambda w, s: awq_scale(w, s, quantizer)) if "awq" in chosen else smoothquant_scale,
            weight,
            state,
        )
        scales = {"scale": scale}
        weight = each(lambda w, s: multiplied(w, s, (0,)), weight, scale)
        state = each(rescaled, state, scale)
    if "gptq" in chosen:
        stored = each(lambda w, s: gptq(w, s.hessian, quantizer), weight, state)
    else:
        stored = each(lambda w: rtn(w, quantizer), weight)
    return {"weight": matrix.whole(stored), **scales}


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """How a layer's weight becomes a matrix, inputs by outputs, and a stored one becomes a weight again.

    Attributes:
        own: shape of one layer's weight.
        stacking: where several layers are; as matrices they are stacked along leading axes.
        axes: what the product sums over, in one layer's weight.
    """

    own: tuple[int, ...]
    stacking: Stacking
    axes: tuple[int, ...]

    @classmethod
    def of(cls, site: Site) -> "_Matrix":
        stacking = site.stacking
        return cls(stacking.own(read(site.variable).shape), stacking, site.axes)

    @property
    def order(self) -> list[int]:
        """Axes of one layer's weight: those that are summed over first."""
        rest = [a for a in range(len(self.own)) if a not in self.axes]
        return [*self.axes, *rest]

    def flat(self, weight: jax.Array, dtype: Any) -> jax.Array:
        weight = weight if dtype is None else weight.astype(dtype)
        n, count = math.prod(self.own[a] for a in self.axes), len(self.stacking.sizes)
        places = (*range(count), *(count + a for a in self.order))
        moved = jnp.transpose(self.stacking.front(weight), places)
        return moved.reshape(*self.stacking.sizes, n, -1)

    def whole(self, x: QArray) -> QArray:
        """A stored matrix with the weight's own axes, packed."""
        sizes = [self.own[a] for a in self.order]
        count, lead = len(self.axes), self.stacking.sizes
        back = [self.order.index(a) for a in range(len(self.own))]

        def unflatten(part: jax.Array | None) -> jax.Array | None:
            if part is None:
                return None
            rows, columns = part.shape[len(lead) :]
            shape = [*_split(rows, sizes[:count]), *_split(columns, sizes[count:])]
            view = part.reshape(*lead, *shape)
            view = jnp.transpose(view, (*range(len(lead)), *(len(lead) + a for a in back)))
            return self.stacking.back(view)

        rotation = x.hadamard
        if rotation is not None:
            rotation = (rotation[0], self.axes[-1] - len(self.own))
        parts = map(unflatten, (x.qvalue, x.scale, x.zero_point, x.tensor_scale))
        qvalue, scale, zero_point, tensor_scale = parts
        assert qvalue is not None
        assert scale is not None
        unpacked = QArray(
            qvalue, scale, zero_point, tensor_scale, x.format, x.dtype, hadamard=rotation
        )
        return self.stacking.marked(self.stacking.each(packed)(unpacked))


def _split(groups: int, sizes: Sequence[int]) -> list[int]:
    """How groups of flattened axes lie over these axes: one for all, or blocks along the last."""
    if groups == 1:
        return [1] * len(sizes)
    first = math.prod(sizes[:-1])
    return [*sizes[:-1], groups // first]


def _finish(site: Site, target: Site, solved: Mapping[str, Any]) -> None:
    """Puts a solved layer into the model."""
    operation = target.operation
    if "scale" in solved:
        # Stacked scales go with the layers that they belong to.
        scale = site.stacking.placed(solved["scale"])
        smoothed: Any = Smoothed(operation_of(operation), scale)
        operation = as_kind(site.kind, smoothed)
    put(site, operation)
    store(site, solved["weight"])


# ---------------------------------------------------------------------------------------------------
# Going on where it stopped


def _identities(
    model: Any, target: Mapping[str, Site], batches: Any, method: str, call: Any
) -> dict[str, str]:
    """Hashes of all that decides the result."""
    rules = {path: site.operation for path, site in target.items()}
    return {
        "model": identity("model", model),
        "rules": identity("rules", rules),
        "data": identity("batches", list(series(batches))),
        "method": method,
        "call": identity("call", call),
    }


class _Store:
    """Finished stages in a folder, or nowhere."""

    def __init__(self, workdir: Any, identities: Callable[[], Mapping[str, str]]):
        self.folder = None if workdir is None else Path(workdir)
        self._stage = ""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        marker = self.folder / "quantization.json"
        parts = identities()
        if not marker.exists():
            files.write(marker, json.dumps({"fingerprint": parts}))
        try:
            known = files.read_json(marker)["fingerprint"]
        except (ValueError, KeyError, TypeError):
            known = None
        if other := difference(known, parts):
            raise ValueError(
                f"workdir '{self.folder}' holds the layers of another {other}, or of another version of "
                "jaxquant; choose another"
            )

    def enter(self, paths: Sequence[str]) -> None:
        """Comes to a stage: what it sees depends on how the layers before it were staged."""
        self._stage = hashlib.sha256("\n".join([self._stage, *paths]).encode()).hexdigest()[:16]

    def _path(self) -> Path:
        assert self.folder is not None
        return self.folder / f"{self._stage}.npz"

    def read(self, paths: Sequence[str]) -> dict[str, Any] | None:
        if self.folder is None or not self._path().exists():
            return None
        try:
            with files.opened(self._path()) as opened, np.load(opened) as file:
                files.check_stored(file.zip)
                arrays = {name: file[name] for name in file.files}
            descriptions = files.parse_json(str(arrays.pop("descriptions")), "what they are")
            found = storage.from_arrays(arrays, descriptions)
        except (ValueError, OSError, KeyError, EOFError, BadZipFile, zlib.error) as error:
            raise ValueError(
                f"'{self._path()}' is damaged ({error}); delete it, and it is made anew"
            ) from None
        return {path: found[_key(path)] for path in paths}

    def write(self, paths: Sequence[str], solved: Mapping[str, Any]) -> None:
        if self.folder is None:
            return
        arrays, descriptions = storage.to_arrays({_key(p): dict(solved[p]) for p in paths})
        named: dict[str, Any] = {k: np.asarray(v) for k, v in arrays.items()}
        with files.replacing(self._path()) as file:
            np.savez(file, descriptions=json.dumps(dict(descriptions)), **named)


def _key(path: str) -> str:
    return path.replace("/", ".") or "model"
