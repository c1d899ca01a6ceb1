"""Dates of the Gregorian calendar and times of day."""

from __future__ import annotations

from datetime import date, timedelta
from random import Random
from typing import Any

from .answers import Text
from .base import Family, Instance

_LENGTHS = [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]
_DATE = Text("a date as YYYY-MM-DD")


def _leap(year: int) -> bool:
    return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)


def _lengths(year: int) -> list[int]:
    return [length + (month == 1 and _leap(year)) for month, length in enumerate(_LENGTHS)]


def _walk(start: str, days: int) -> tuple[str, list[str]]:
    """The date some days later or earlier, by counting days of the year, and the steps."""
    year, month, day = map(int, start.split("-"))
    before = sum(_lengths(year)[: month - 1])
    count = before + day + days
    lines = [f"{before}+{day}{days:+}={count}"]
    while not 1 <= count <= 365 + _leap(year):
        step = -365 - _leap(year) if count > 0 else 365 + _leap(year - 1)
        year += 1 if step < 0 else -1
        lines.append(f"{count}{step:+}={count + step}")
        count += step
    month, before = 1, 0
    while count - before > _lengths(year)[month - 1]:
        before += _lengths(year)[month - 1]
        month += 1
    lines.append(f"{count}-{before}={count - before}")
    return f"{year:04}-{month:02}-{count - before:02}", lines


def _random_date(rng: Random, level: int) -> date:
    first, last = (date(2000, 1, 1), date(2029, 12, 31)) if level < 3 else (date(1900, 1, 1), date(2199, 12, 31))
    return first + timedelta(rng.randint(0, (last - first).days))


class DateOffset(Family):
    """The date a number of days after or before another."""

    mode = "value"
    answer = _DATE

    def generate(self, rng: Random, level: int) -> Instance:
        days = rng.randint(1, 9 if level == 0 else 20 * 2**level)
        return {"start": _random_date(rng, level).isoformat(), "days": days * (rng.choice([1, -1]) if level else 1)}

    def prompt(self, x: Instance) -> str:
        return f"Which date is {abs(x['days'])} days {'after' if x['days'] > 0 else 'before'} {x['start']}?"

    def solve(self, x: Instance) -> str:
        return (date.fromisoformat(x["start"]) + timedelta(x["days"])).isoformat()

    def work(self, x: Instance) -> str:
        return "\n".join(_walk(x["start"], x["days"])[1])

    def oracle(self, x: Instance) -> str:
        return _walk(x["start"], x["days"])[0]


class WhichDate(Family):
    """The date on which one age in days is a given multiple of another."""

    mode = "inverse"
    answer = _DATE

    def generate(self, rng: Random, level: int) -> Instance:
        p, q = (2, 1) if level == 0 else (rng.randint(2, 5), 1)
        if level >= 4:
            p, q = rng.choice([(5, 2), (7, 2), (4, 3), (5, 3), (7, 3), (7, 4), (9, 4), (8, 5)])
        older, gap = _random_date(rng, level), (p - q) * rng.randint(1, 12 if level == 0 else 40 * level**2)
        return {"older": older.isoformat(), "younger": (older + timedelta(gap)).isoformat(), "p": p, "q": q}

    def prompt(self, x: Instance) -> str:
        times = f"{x['p']}" if x["q"] == 1 else f"{x['p']}/{x['q']}"
        return f"Ann was born on {x['older']}, Bo on {x['younger']}. When is Ann's age in days {times} times Bo's?"

    def _ages(self, x: Instance) -> tuple[int, int]:
        """The difference of the ages, and the younger one's age on the date."""
        gap = (date.fromisoformat(x["younger"]) - date.fromisoformat(x["older"])).days
        return gap, gap // (x["p"] - x["q"]) * x["q"]

    def solve(self, x: Instance) -> str:
        return (date.fromisoformat(x["younger"]) + timedelta(self._ages(x)[1])).isoformat()

    def work(self, x: Instance) -> str:
        gap, age = self._ages(x)
        lines = _walk(x["younger"], age)[1]
        return "\n".join([f"Bo is {gap} days younger", f"{gap}*{x['q']}/{x['p'] - x['q']}={age}", *lines])

    def oracle(self, x: Instance) -> str | None:
        older, younger = date.fromisoformat(x["older"]), date.fromisoformat(x["younger"])
        for days in range(1, 2_000):
            on = younger + timedelta(days)
            if (on - older).days * x["q"] == (on - younger).days * x["p"]:
                return on.isoformat()
        return None

    def size(self, x: Instance) -> float:
        return self._ages(x)[1]


def _clock(seconds: int, fine: bool) -> str:
    text = f"{seconds // 3600:02}:{seconds // 60 % 60:02}"
    return f"{text}:{seconds % 60:02}" if fine else text


class ClockArithmetic(Family):
    """The time of day after going forward and back; with seconds from level 5 on."""

    mode = "value"
    answer = Text("the time of day, written like the first one")

    def generate(self, rng: Random, level: int) -> Instance:
        if level == 0:
            return {"start": 300 * rng.randrange(288), "shifts": [300 * rng.randint(1, 11)]}
        unit = 60 if level < 5 else 1
        shifts = [
            rng.choice([-1, 1]) * unit * rng.randrange(3600 // unit, 40_000 // unit) for _ in range(1 + level // 2)
        ]
        return {"start": unit * rng.randrange(86_400 // unit), "shifts": shifts}

    def _fine(self, x: Instance) -> bool:
        return any(n % 60 for n in (x["start"], *x["shifts"]))

    def prompt(self, x: Instance) -> str:
        fine = self._fine(x)
        moves = ", then ".join(f"{_clock(abs(s), fine)} {'later' if s > 0 else 'earlier'}" for s in x["shifts"])
        return f"A 24-hour clock shows {_clock(x['start'], fine)}. What does it show {moves}?"

    def solve(self, x: Instance) -> str:
        return _clock((x["start"] + sum(x["shifts"])) % 86_400, self._fine(x))

    def work(self, x: Instance) -> str:
        now, fine, lines = x["start"], self._fine(x), []
        for shift in x["shifts"]:
            after = (now + shift) % 86_400
            sign = "+" if shift > 0 else "-"
            lines.append(f"{_clock(now, fine)}{sign}{_clock(abs(shift), fine)}={_clock(after, fine)}")
            now = after
        return "\n".join(lines)

    def oracle(self, x: Instance) -> str:
        second, minute, hour = x["start"] % 60, x["start"] // 60 % 60, x["start"] // 3600
        for shift in x["shifts"]:
            sign = 1 if shift > 0 else -1
            second += sign * (abs(shift) % 60)
            minute += sign * (abs(shift) // 60 % 60) + second // 60
            hour += sign * (abs(shift) // 3600) + minute // 60
            second, minute, hour = second % 60, minute % 60, hour % 24
        return f"{hour:02}:{minute:02}" + (f":{second:02}" if self._fine(x) else "")


class CommonFreeSlot(Family):
    """The earliest start of a free gap of a wanted length between meetings that may overlap."""

    mode = "optimise"
    answer = Text("a time as HH:MM")

    def generate(self, rng: Random, level: int) -> Instance:
        while True:
            starts = [540 + 5 * rng.randrange(24 + 10 * level) for _ in range(3 + level)]
            busy = [[start, start + 5 * rng.randint(2, 12)] for start in starts]
            x: Instance = {"busy": busy, "length": 5 * rng.randint(3, 12)}
            if 540 < self._start(x) < 1440 - x["length"]:
                return x

    def prompt(self, x: Instance) -> str:
        busy = ", ".join(f"{_clock(60 * start, False)}-{_clock(60 * end, False)}" for start, end in x["busy"])
        return f"Busy: {busy}. When is the earliest start, from 09:00 on, of {x['length']} free minutes?"

    def _start(self, x: Instance) -> int:
        free = 540
        for start, end in sorted(x["busy"]):
            if start - free >= x["length"]:
                break
            free = max(free, end)
        return free

    def solve(self, x: Instance) -> str:
        return _clock(60 * self._start(x), False)

    def work(self, x: Instance) -> str:
        free, lines = 540, []
        for start, end in sorted(x["busy"]):
            if start > free:
                lines.append(f"{_clock(60 * free, False)}-{_clock(60 * start, False)}: {start - free}")
            if start - free >= x["length"]:
                break
            free = max(free, end)
        return "\n".join(lines)

    def oracle(self, x: Instance) -> str:
        run, minute = 0, 540
        while run < x["length"]:
            run = 0 if any(start <= minute < end for start, end in x["busy"]) else run + 1
            minute += 1
        return _clock(60 * (minute - run), False)

    def canonical(self, x: Instance) -> Any:
        return [sorted(x["busy"]), x["length"]]
