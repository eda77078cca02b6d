"""Writes bytes, durations, shares and rates for people, and reads bytes that people write. Pure."""

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
    """A number of bytes with k, M, G or T for powers of 1000; None if the text is not one."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)([kMGT]?)", text)
    return None if match is None else round(float(match[1]) * FACTORS[match[2]])


def bytes_text(count: float) -> str:
    """A size for people, in decimal units like those of disks and networks: 318.2 GB."""
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
    """How long before `now` a moment was, both in seconds since 1970: 12 s ago."""
    return f"{seconds_text(max(0.0, now - then))} ago"


def count_text(count: int, noun: str) -> str:
    """A number with a noun: 1 peer, 2 peers, 1,000 peers."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def share_text(part: int, whole: int) -> str:
    """A share for people, rounded down: 100.0 % only for the whole, 0.0 % only below 0.1 %."""
    tenths = 1000 * part // whole if whole else 1000
    return f"{tenths // 10}.{tenths % 10} %"


def speed_text(tokens_per_s: float) -> str:
    """Tokens per second for people, with a third decimal below one."""
    digits = 2 if tokens_per_s >= 1 else 3
    return f"{tokens_per_s:.{digits}f} tokens/s"
