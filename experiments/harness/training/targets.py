"""Devices that are not there, for compilers that need none: TPUs by topology, GPUs by description.

Both compilers prove that a program lowers, which types it multiplies and what it takes of the memory.  They
say nothing of time.  A GPU's compiler has no autotuner there, so on the device it may choose other kernels
for the same products.  Each compilation belongs into a process of its own, since some programs abort theirs.
"""

import dataclasses
import functools
import importlib.util
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies

_FLAT = ("v5e", "v6e", "v2", "v3")  # their chips lie on a plane
_ENVIRONMENTS = {
    "tpu": {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # it would look for a TPU's host on the network
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    },
    # The plugin would look for CUDA's libraries, of which a compiler needs few.
    "cuda": {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"},
}
_COMPILERS = {"tpu": ("libtpu",), "cuda": ("jax_plugins.xla_cuda13",)}
_PACKAGES = {
    "tpu": "the TPU's compiler, libtpu (no TPU): pip install -e '.[tpu]'",
    "cuda": "the GPU's compiler (no GPU): Python 3.12 and pip install -e '.[cuda-compiler]'",
}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU, as XLA describes one to its compiler.

    Attributes:
        name: JAX's device_kind.
        capability: CUDA's compute capability (major, minor).
        cores: streaming multiprocessors.
        memory: bytes.
        bandwidth: bytes a second to and from it.
        cache: bytes of its L2.
        clock: GHz.
        bus: bytes a second of PCIe.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    memory: int
    bandwidth: int
    cache: int
    clock: float
    bus: int

    def description(self) -> str:
        """Returns XLA's GpuTargetConfigProto as text."""
        major, minor = self.capability
        limits = {
            "threads_per_block_limit": 1024, "threads_per_warp": 32, "threads_per_core_limit": 2048,
            "fpus_per_core": 128, "shared_memory_per_block": 49152, "shared_memory_per_core": 233472,
            "shared_memory_per_block_optin": 232448, "registers_per_core_limit": 65536,
            "registers_per_block_limit": 65536, "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 65535, "block_dim_limit_z": 65535, "thread_dim_limit_x": 1024,
            "thread_dim_limit_y": 1024, "thread_dim_limit_z": 64, "device_address_bits": 64,
            "core_count": self.cores, "device_memory_size": self.memory,
            "memory_bandwidth": self.bandwidth, "l2_cache_size": self.cache,
            "clock_rate_ghz": self.clock, "pcie_bandwidth": self.bus, "ecc_enabled": "true",
        }  # fmt: skip
        words = {
            "name": self.name, "device_vendor": "NVIDIA Corporation",
            "platform_version": f"Compute Capability {major}.{minor}a",
            "driver_version": "13.0.0", "runtime_version": "13.0.0",
            "compile_time_toolkit_version": "13.0.0", "dnn_version": "9.20.0",
        }  # fmt: skip
        fields = [f"{name}: {value}" for name, value in limits.items()]
        fields += [f'{name}: "{value}"' for name, value in words.items()]
        fields.append(
            f"cuda_compute_capability {{ major: {major} minor: {minor} "
            "feature_extension: ACCELERATED_FEATURES }"
        )
        return (
            f"gpu_device_info {{ {' '.join(fields)} }} platform_name: 'CUDA' "
            f"dnn_version_info {{ major: 9 minor: 20 }} device_description_str: '{self.name}'"
        )


# xla/backends/gpu/target_config/specs/{h100_sxm,b200}.txtpb in openxla/xla, at 0774019 and 300ec95; what both
# have in common, `Gpu.description` says.
GPUS = {
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 84942979072, 3352320000000, 52428800, 1.98, 2**35
    ),
    "b200": Gpu("NVIDIA B200", (10, 0), 148, 191514411008, 7672320000000, 132644864, 1.965, 2**36),
}


def platform_of(topology: str) -> str:
    """Returns "tpu" or "cuda".

    >>> platform_of("v5e:2x2"), platform_of("h100:8")
    ('tpu', 'cuda')
    """
    return "cuda" if topology.split(":")[0] in GPUS else "tpu"


def environment(topology: str) -> dict[str, str]:
    """Returns the variables that a process that compiles for a topology needs."""
    return _ENVIRONMENTS[platform_of(topology)]


def missing_compiler(topology: str) -> str | None:
    """Returns what to install where the topology's compiler is not there, else None."""
    platform = platform_of(topology)
    for name in _COMPILERS[platform]:
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return _PACKAGES[platform]
    return None


def devices(topology: str) -> list[Any]:
    """Returns the devices of a topology.

    Args:
        topology: of TPUs, as ``v5e:16x16``, or GPUs of one host, as ``h100`` or ``h100:8``.

    Raises:
        ValueError: none that a compiler knows.
    """
    return _gpus(topology) if platform_of(topology) == "cuda" else _tpus(topology)


def lower(function: Callable[..., Any], arguments: tuple[Any, ...], topology: str) -> Any:
    """Returns a jitted function lowered for a topology, whose devices its arguments' shardings name."""
    traced: Any = function
    platforms = {"lowering_platforms": ("cuda",)} if platform_of(topology) == "cuda" else {}
    return traced.trace(*arguments).lower(**platforms)


def _gpus(topology: str) -> list[Any]:
    known = re.fullmatch(r"([a-z0-9]+)(?::([1-9][0-9]*))?", topology)
    if known is None:
        raise ValueError(
            f"--topology of GPUs is {' or '.join(GPUS)}, with their number on one host, as h100:8; got "
            f"{topology!r}"
        )
    return list(_description(known[1], int(known[2] or 1)).devices)


@functools.cache
def _description(name: str, count: int) -> Any:
    return topologies.get_topology_desc(
        platform="cuda", target_config=GPUS[name].description(), topology=f"1x1x{count}"
    )


def _tpus(topology: str) -> list[Any]:
    known = re.fullmatch(r"[a-z0-9]+:\d+(x\d+){1,2}", topology)
    if known and topology.split(":")[0] in _FLAT and topology.count("x") > 1:
        raise ValueError(
            f"--topology of {topology.split(':')[0]} has two dimensions, as 4x4; got {topology!r}"
        )
    try:
        if known:
            return list(topologies.get_topology_desc(topology, "tpu").devices)
        raise ValueError("it is none")
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            "--topology is one of TPUs that the compiler knows, as v5e:16x16, v6e:4x4 or v5p:4x4x4, or of "
            f"GPUs, as h100 or h100:8; got {topology!r} ({reason})"
        ) from None
