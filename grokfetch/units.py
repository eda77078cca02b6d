"""How bytes, seconds, shares and rates are written for people, and read from them. Pure."""

from __future__ import annotations

import re

__all__ = [
    "ago_text",
    "bytes_text",
    "count_text",
    "parse_bytes",
    "seconds_text",
    "share_text",
    "speed_text",
]

FACTORS = {"": 1, "k": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}


def parse_bytes(text: str) -> int | None:
    """The bytes that a person names, with k, M, G or T for powers of 1000; None if they do not."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)([kMGT]?)", text)
    return None if match is None else round(float(match[1]) * FACTORS[match[2]])


def bytes_text(count: float) -> str:
    """A size for people, in decimal units as disks and networks use them: 318.2 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def seconds_text(seconds: float) -> str:
    """A duration for people: 0.03 s, 12 s, 3 min 20 s, 5 h 12 min, 2 d 3 h."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, seconds_left = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {seconds_left} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"


def ago_text(then: float, now: float) -> str:
    """How long ago a moment was, both in seconds since 1970: 12 s ago."""
    return f"{seconds_text(max(0.0, now - then))} ago"


def count_text(count: int, noun: str) -> str:
    """A number of things: 1 peer, 2 peers, 1,000 peers."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def share_text(part: int, whole: int) -> str:
    """A share for people that says 100.0 % only of all, and 0.0 % only of less than a tenth."""
    tenths = 1000 * part // whole if whole else 1000
    return f"{tenths // 10}.{tenths % 10} %"


def speed_text(tokens_per_s: float) -> str:
    """Tokens a second for people, three digits where they are few."""
    digits = 2 if tokens_per_s >= 1 else 3
    return f"{tokens_per_s:.{digits}f} tokens/s"
