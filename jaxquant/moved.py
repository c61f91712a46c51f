"""Modules by the names that they had before they were in rooms, for one release, with a warning."""

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from types import ModuleType
from typing import Any

_ROOMS = {
    "numerics": "sharding reductions opaque groups rounding packing calibration estimators "
    "quantizer qarray measuring stored stacking",
    "operations": "integers product dot native ragged conv smoothed adapters attention recipes "
    "tapped monitoring",
    "engine": "expressions rules batches",
    "artifacts": "files settings storage rule_files specification cards serving",
    "quality": "versions",
    "optim": "pages",
}
PLACES = {
    name: f"jaxquant.{room}.{name}" for room, names in _ROOMS.items() for name in names.split()
} | {"seals": "jaxquant.artifacts.checksums"}


def module(name: str, stacklevel: int) -> ModuleType:
    """Returns the module that once was ``jaxquant.NAME``."""
    warnings.warn(
        f"jaxquant.{name} is now {PLACES[name]}; the old name goes with the next release",
        DeprecationWarning,
        stacklevel=stacklevel,
    )
    return importlib.import_module(PLACES[name])


class _Loader(importlib.abc.Loader):
    def exec_module(self, module: ModuleType) -> None:
        own = vars(importlib.import_module(PLACES[module.__name__.removeprefix("jaxquant.")]))
        module.__dict__.update({n: x for n, x in own.items() if not n.startswith("__")})


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        name = fullname.removeprefix("jaxquant.")
        if name == fullname or name not in PLACES:
            return None
        module(name, stacklevel=3)
        return importlib.util.spec_from_loader(fullname, _Loader())


def install() -> None:
    """Makes the old names importable as modules, after all other finders."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
