"""How long a server asks us to wait, by the headers of its answer. Pure.

`Retry-After` (RFC 9110, 10.2.3) gives seconds or a date; `RateLimit` (draft-ietf-httpapi-ratelimit-
headers, versions 3 to 10) the seconds until an exhausted quota is renewed, as Hugging Face sends
it; `RateLimit-Reset` and `X-RateLimit-Reset` the same, as seconds or as seconds since 1970.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

__all__ = ["LONGEST_REST_S", "rest_asked_for"]

LONGEST_REST_S = 600.0
"""A server that asks for a longer wait than this is asked again anyway."""

EPOCH = 1e9
"""A reset larger than this is a time, not a number of seconds."""


def rest_asked_for(headers: Mapping[str, str], now: float) -> float | None:
    """The seconds to wait before the next request, 0 to `LONGEST_REST_S`; None if it says nothing.

    Args:
        headers: of the answer, their names in lower case.
        now: seconds since 1970, used if the answer has no date of its own.
    """
    now = _date(headers.get("date", ""), now)
    rest_s = _after(headers.get("retry-after", "").strip(), now)
    if rest_s is None:
        rest_s = _quota(headers.get("ratelimit", ""))
    if rest_s is None:
        rest_s = _reset(headers, now)
    return None if rest_s is None else min(max(rest_s, 0.0), LONGEST_REST_S)


def _date(text: str, otherwise: float) -> float:
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError, OSError):
        return otherwise


def _after(text: str, now: float) -> float | None:
    if re.fullmatch(r"\d{1,9}(\.\d{1,6})?", text):
        return float(text)
    date = _date(text, -1.0)
    return None if date < 0 else date - now


def _quota(text: str) -> float | None:
    """The longest time among the exhausted quotas."""
    times = []
    for quota in text.split(";") if "remaining=" in text else text.split(","):
        left = re.search(r"\br\s*=\s*(\d{1,9})", quota)
        after = re.search(r"\bt\s*=\s*(\d{1,9})", quota)
        if left and after and int(left[1]) == 0:
            times.append(float(after[1]))
    if not times and (left := re.search(r"\bremaining\s*=\s*0\b", text)):
        after = re.search(r"\breset\s*=\s*(\d{1,9})", text)
        times += [float(after[1])] if left and after else []
    return max(times, default=None)


def _reset(headers: Mapping[str, str], now: float) -> float | None:
    for prefix in ("ratelimit", "x-ratelimit"):
        left = headers.get(f"{prefix}-remaining", "0").strip()
        reset = headers.get(f"{prefix}-reset", "").strip()
        if re.fullmatch(r"\d{1,12}", reset) and re.fullmatch(r"0+", left):
            return float(reset) - now if float(reset) > EPOCH else float(reset)
    return None
