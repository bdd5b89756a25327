"""What the process holds, and sizes as people write them. Linux; elsewhere nothing is measured."""

from __future__ import annotations

import ctypes
import re
from typing import Dict, Optional, Union

from .errors import CollectError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
          "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_size(text: Union[str, int]) -> int:
    """`8GiB`, `512MiB`, `5GB`, `1048576` in bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    unit = _UNITS.get(match.group(2).lower()) if match else None
    if match is None or unit is None or float(match.group(1)) * unit < 1:
        raise CollectError(f"a size such as 8GiB, 512MiB or 1048576 is expected, got `{text}`")
    return int(float(match.group(1)) * unit)


def show_size(size: float) -> str:
    return f"{size / 2**20:.0f} MiB" if size < 2**31 else f"{size / 2**30:.1f} GiB"


def _status() -> Dict[str, int]:
    found: Dict[str, int] = {}
    try:
        with open("/proc/self/status") as status:
            for line in status:
                key, _, value = line.partition(":")
                if value.endswith("kB\n"):
                    found[key] = int(value.split()[0]) << 10
    except OSError:
        pass
    return found


def held() -> Optional[int]:
    """Anonymous and shared memory now, in bytes; pages of files are the system's to take back."""
    status = _status()
    return status["RssAnon"] + status.get("RssShmem", 0) if "RssAnon" in status else None


def peak() -> Optional[int]:
    """The most that was held since [`reset_peak`], from above: all pages at their peak less the file pages of now."""
    status = _status()
    return status["VmHWM"] - status.get("RssFile", 0) if "VmHWM" in status else None


def reset_peak() -> None:
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def give_back() -> None:
    """Returns freed memory to the system (glibc keeps it)."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        pass
