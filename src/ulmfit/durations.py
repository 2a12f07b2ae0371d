"""Durations as people write and read them."""

from __future__ import annotations


def seconds_of(duration: str | None) -> float | None:
    """Of a checked DD:HH:MM:SS; None stays None."""
    if duration is None:
        return None
    days, hours, minutes, seconds = map(int, duration.split(":"))
    return float(((24 * days + hours) * 60 + minutes) * 60 + seconds)


def duration_of(seconds: float) -> str:
    """DD:HH:MM:SS, rounded down and not below zero."""
    minutes, s = divmod(max(0, int(seconds)), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours // 24:02}:{hours % 24:02}:{m:02}:{s:02}"


def clock(seconds: float) -> str:
    """h:mm:ss, or mm:ss below an hour."""
    minutes, s = divmod(round(max(0.0, seconds)), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m:02}:{s:02}"
