"""The processor that a figure was measured on."""

import os
import platform
from pathlib import Path


def processor() -> str:
    """Its name as Linux reports it, its widest vector instructions, and the number of cores this process may use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    stripped = {name.strip(): value.strip() for name, value in fields.items()}
    flags = stripped.get("flags", "").split()
    widest = next((name for name in ("amx_tile", "avx512f", "avx2") if name in flags), platform.machine())
    return f"{stripped.get('model name', platform.processor())}, {widest}, {len(os.sched_getaffinity(0))} cores"
