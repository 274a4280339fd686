"""What a scenario prints: JSON lines. A step says what happened; a figure has a unit, and a bar where there is one.

What must hold and does not ends a scenario. A figure that misses its bar does not: the rest is wanted all the same.
"""

import json
from typing import Any

_missed: list[str] = []


def say(step: str, **facts: Any) -> None:
    print(json.dumps({"step": step, **facts}), flush=True)


def figure(
    name: str,
    value: float,
    unit: str,
    *,
    limit: float | None = None,
    bar: float | None = None,
    higher_is_better: bool = True,
) -> None:
    """One figure as the other benchmarks print it: beside its limit, if it has one, with the ratio between them, which
    must reach the bar. One that does not fails the scenario at its end."""
    ratio = None if limit is None else (value / limit if higher_is_better else limit / value)
    ok = bar is None or (ratio is not None and ratio >= bar)
    line = {"name": name, "value": round(value, 4), "unit": unit, "limit": limit, "ratio": ratio, "bar": bar, "ok": ok}
    print(json.dumps(line), flush=True)
    if not ok:
        _missed.append(name)


def verdict() -> None:
    """The end of a scenario in which everything held."""
    if _missed:
        names = ", ".join(_missed)
        raise SystemExit(f"MISSED: {names}. All else held. Seconds count on a machine that does nothing else only")
    say("done")


def check(holds: bool, what: str) -> None:
    """Ends the scenario where something that must hold does not."""
    if not holds:
        raise SystemExit(f"FAILED: {what}")
