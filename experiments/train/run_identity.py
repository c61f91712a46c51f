"""The identity of the run in a folder: a resumed run must match it."""

import dataclasses
from pathlib import Path
from typing import Any

from jax.sharding import AbstractMesh, Mesh

from experiments.harness.running import files, processes
from experiments.harness.training import arms
from experiments.train.program import Config

# What may differ between a run and the run that goes on from its checkpoint.
_LAYOUT = ("mesh_data", "mesh_fsdp", "mesh_tensor", "checkpoint_every", "monitor_every")
_POLICY = ("on_spike", "spike", "roll_back_steps")
_DATA = "data_fingerprint"
_AXES = ("fsdp", "tensor")
# Settings that the config.json of an older run does not name, with what that run had.
_LATER = {"params_dtype": "float32"}
# What both have alike, and every run's config.json names.
_SETTINGS = {field.name for field in dataclasses.fields(Config)} - {*_LAYOUT, *_POLICY, *_LATER}


def read(workdir: Path) -> dict[str, Any] | None:
    """Returns the settings and data fingerprint of the run in a folder; None if nothing is saved yet.

    Raises:
        ValueError: it holds something else, or checkpoints of nobody knows what.
    """
    path = workdir / "config.json"
    has_saved = any((workdir / "checkpoints").glob("[0-9]*")) or (workdir / "result.json").exists()
    try:
        found = files.read_json(path)
    except OSError as error:
        raise ValueError(f"'{path}' cannot be read: {error.strerror}") from None
    if has_saved and not isinstance(found, dict):
        raise ValueError(
            f"workdir '{workdir}' holds checkpoints, but no whole config.json saying of which run; "
            "choose another --workdir"
        )
    if found is None and (workdir / "study.json").exists():
        raise ValueError(f"workdir '{workdir}' holds a study's records; choose another --workdir")
    if found is not None and not (isinstance(found, dict) and found.keys() >= _SETTINGS):
        raise ValueError(f"'{path}' is not a training run's; choose another --workdir")
    return {**_LATER, **found} if has_saved and found is not None else None


def page_shards(
    config: Config, mesh: Mesh | AbstractMesh, there: dict[str, Any] | None
) -> tuple[int, ...]:
    """Returns parts of the state's pages along fsdp and tensor: those that the run began with.

    Args:
        config: the run.
        mesh: what it now has.
        there: of `read`.

    Raises:
        ValueError: parts that the mesh does not divide.
    """
    if config.state == arms.EXACT:
        return ()
    own = tuple(mesh.shape[axis] for axis in _AXES)
    parts = config.state_shards or tuple((there or {}).get("state_shards", own))
    if any(n % size for n, size in zip(parts, own, strict=True)):
        begun = "" if there is None else ", as the run began in that workdir"
        raise ValueError(
            f"the state's pages lie in {parts[0]} x {parts[1]} parts along fsdp and tensor{begun}, which a "
            f"mesh of fsdp {own[0]} and tensor {own[1]} does not divide; choose --config.mesh_fsdp and "
            "--config.mesh_tensor that do (more devices may go to mesh_data)"
        )
    return parts


def check_or_write(workdir: Path, config: Config, fingerprint: str) -> None:
    """Marks the folder as this run's, or finds that it is.

    Args:
        workdir: held by this run alone.
        config: the run, with its `page_shards`.
        fingerprint: of its data.

    Raises:
        ValueError: it cannot be written, or holds another run.
    """
    kept = {k: v for k, v in vars(config).items() if k not in _LAYOUT}
    content = {k: [*v] if isinstance(v, tuple) else v for k, v in kept.items()}  # as JSON has it
    content[_DATA] = fingerprint
    there = read(workdir)
    if there is not None:
        _compare(workdir, content, there)
    if processes.is_first():
        try:
            files.write_json(workdir / "config.json", content)
        except OSError as error:
            raise ValueError(f"workdir '{workdir}' cannot be written: {error.strerror}") from None


def _compare(workdir: Path, content: dict[str, Any], there: dict[str, Any]) -> None:
    changed = [k for k, v in content.items() if there.get(k) != v and k not in _POLICY]
    if changed == [_DATA]:
        raise ValueError(
            f"the run in workdir '{workdir}' began with other data than config.data {content['data']!r} "
            f"now has{' at ' + repr(content['data_path']) if content['data_path'] else ''}; put it back, or "
            "choose another --workdir"
        )
    if changed:
        named = ", ".join(f"{k} {there.get(k)!r} there, {content[k]!r} here" for k in changed)
        raise ValueError(
            f"workdir '{workdir}' holds another run ({named}); choose another --workdir"
        )
