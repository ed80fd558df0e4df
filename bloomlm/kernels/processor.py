"""What instructions this processor has."""

from pathlib import Path

BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Names of instructions for products in bf16: AVX-512's, AMX's and those of Arm."""


def instruction_sets() -> frozenset[str]:
    """The names by which Linux lists them; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(word for line in lines if line.startswith(("flags", "Features")) for word in line.split())
