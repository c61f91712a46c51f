"""What a run ran on."""

import os
import platform
from pathlib import Path

import jax

import jaxquant as jq


def versions() -> dict[str, str]:
    """Of the libraries, and the kind of device."""
    return {
        "jaxquant": jq.__version__,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }


def cores() -> int | None:
    """Processor cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count()


def cpu() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
