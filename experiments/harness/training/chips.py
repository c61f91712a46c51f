"""Published figures of TPU and GPU chips: memory, peak rates and links.  None of them is measured here."""

import dataclasses

from jaxquant.laws.chips import PEAKS


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
        name: as topologies have it, or the maker.
        hbm: bytes of memory.
        hbm_rate: bytes a second to and from it.
        link_rate: bytes a second over all of its links to other chips, both ways together.
        peak: operations a second in matrix products, by the type of the operands.
        cores: devices that JAX sees in it.
    """

    name: str
    hbm: int
    hbm_rate: float
    link_rate: float
    peak: dict[str, float]
    cores: int = 1


# docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}, and NVIDIA's data sheets of A100 (SXM), H100 (SXM),
# H200 and HGX B200; by JAX's device_kind.  Peaks are those by which the planner counts bits.
CHIPS = {
    "TPU v5 lite": Chip("v5e", 16 * 2**30, 819e9, 400e9, PEAKS["v5e"]),
    "TPU v5": Chip("v5p", 95 * 2**30, 2765e9, 1200e9, PEAKS["v5p"]),
    "TPU v6 lite": Chip("v6e", 32 * 2**30, 1638e9, 800e9, PEAKS["v6e"]),
    "TPU7x": Chip("tpu7x", 192 * 2**30, 7380e9, 1200e9, PEAKS["tpu7x"], cores=2),
    "NVIDIA A100-SXM4-40GB": Chip("A100", 40 * 10**9, 1555e9, 600e9, PEAKS["A100"]),
    "NVIDIA A100-SXM4-80GB": Chip("A100", 80 * 10**9, 2039e9, 600e9, PEAKS["A100"]),
    "NVIDIA H100 80GB HBM3": Chip("H100", 80 * 10**9, 3350e9, 900e9, PEAKS["H100"]),
    "NVIDIA H200": Chip("H200", 141 * 10**9, 4800e9, 900e9, PEAKS["H200"]),
    "NVIDIA B200": Chip("B200", 180 * 10**9, 7700e9, 1800e9, PEAKS["B200"]),
}


def of_kind(device_kind: str) -> Chip:
    """Returns the chip of a JAX device.

    Raises:
        ValueError: one of which nothing is written here.

    >>> of_kind("TPU v5 lite").peak["s8"] / 1e12
    393.0
    """
    if device_kind not in CHIPS:
        raise ValueError(f"figures are known of {', '.join(CHIPS)}; got {device_kind!r}")
    return CHIPS[device_kind]
