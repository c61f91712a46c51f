"""What is there: the device, its driver, versions, and how fast memory is copied."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from typing import Any

import jax
import jax.numpy as jnp

from experiments.device_check.recording import Asker
from experiments.device_check.settings import Config
from experiments.harness.running import machine
from experiments.harness.training import chips

_NVIDIA = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit"
_COPIES = 10


def ask(config: Config, asker: Asker) -> None:
    """Asks what is there."""
    asker("versions", "measured", _versions)
    asker("device", "measured", _device)
    asker("copies of memory", "measured", lambda: _copies(512 * config.values))


def _versions() -> dict[str, Any]:
    names = ("jaxlib", "jax-cuda13-plugin", "flax", "optax", "numpy", "ml_dtypes")
    every = {x.name: x.version for x in importlib.metadata.distributions()}
    shown = {k: v for k, v in every.items() if k in names or k.startswith(("nvidia-", "libtpu"))}
    flags = os.environ.get("XLA_FLAGS", "")
    return {"python": platform.python_version(), **machine.versions(), **shown, "xla_flags": flags}


def _device() -> dict[str, Any]:
    first, found = jax.devices()[0], dict[str, Any]()
    if command := shutil.which("nvidia-smi"):
        query = [command, f"--query-gpu={_NVIDIA}", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
        found["nvidia_smi"] = done.stdout.strip() or done.stderr.strip()
    return found | {
        "devices": jax.device_count(),
        "platform": first.platform,
        "platform_version": " ".join(first.client.platform_version.split()),
        "bytes_limit": (first.memory_stats() or {}).get("bytes_limit"),
        "cpu": f"{machine.cpu()}, {machine.cores()} cores",
    }


def _copies(size: int) -> dict[str, Any]:
    """Bytes a second, read and written, of x + 1."""
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jax.block_until_ready(add(jnp.zeros(size)))
    start = time.perf_counter()
    for _ in range(_COPIES):
        x = add(x)
    jax.block_until_ready(x)
    rate = _COPIES * 2 * x.nbytes / (time.perf_counter() - start)
    chip = chips.CHIPS.get(jax.devices()[0].device_kind)
    share = {} if chip is None else {"of_the_published_rate": rate / chip.hbm_rate}
    return {"bytes": x.nbytes, "bytes_per_second": rate, **share}
