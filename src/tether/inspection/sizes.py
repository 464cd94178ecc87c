"""Numbers of bytes in units that people read."""

from __future__ import annotations


def human_bytes(number: int) -> str:
    """A number of bytes in decimal units: `512 B`, `200.7 kB`, `1.3 GB`."""
    if abs(number) < 1000:
        return f"{number} B"
    size = number / 1000
    for unit in ("kB", "MB", "GB", "TB"):
        if abs(size) < 999.95:
            return f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} PB"
