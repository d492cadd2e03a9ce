"""Bytes, rates and durations as people read them."""


def rate_of(nbytes: int, seconds: float) -> str:
    """Bytes and rate: `12.3 GiB (0.81 GB/s)`."""
    return f"{size(nbytes)} ({nbytes / max(seconds, 1e-9) / 1e9:.2f} GB/s)"


def size(nbytes: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def duration(seconds: float) -> str:
    """95 -> "1 min 35 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
