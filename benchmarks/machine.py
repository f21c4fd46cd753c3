"""Which processor gave a number."""

from __future__ import annotations

from pathlib import Path

FEATURES = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")  # of these the first that it has decides its speed here


def processor() -> str:
    """The processor's name and the widest arithmetic that it has, on Linux."""
    about = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = dict(line.split(":", 1) for line in about if ":" in line)
    values = {name.strip(): value.strip() for name, value in fields.items()}
    flags = values.get("flags", "").split()
    return f"{values.get('model name', 'unknown processor')}, {next((f for f in FEATURES if f in flags), 'no AVX2')}"
