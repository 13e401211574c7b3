"""What kind of processor this is, for the names of results: speeds of one kind say little of another."""

import platform
from pathlib import Path

# Instructions that matter most here, the strongest first.
EXTRA = {"amx_bf16": "-amx", "avx512_fp16": "-fp16", "avx512_bf16": "-bf16"}
MAKERS = {"GenuineIntel": "intel", "AuthenticAMD": "amd"}


def processor_kind() -> str:
    """Maker and widest vectors: 'intel-avx512', 'intel-avx512-amx', 'amd-avx512-bf16', 'arm64'."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine().lower()
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if found.get("vendor_id") not in MAKERS:
        return platform.machine().lower()
    flags = found["flags"].split()
    wide = "avx512" if "avx512f" in flags else "avx2"
    extra = next((name for flag, name in EXTRA.items() if flag in flags), "")
    return f"{MAKERS[found['vendor_id']]}-{wide}{extra}"
