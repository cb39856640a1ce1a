"""Timings that can be compared: contenders take turns in one process, and medians are reported."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

Work = Callable[[], object]


def interleaved(
    contenders: Mapping[str, Work],
    repeats: int,
    after: Mapping[str, Work] | None = None,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """{contender: seconds of each repeat}. The contenders take turns.

    The first round is not counted. after[contender] runs after the contender's turn and is not
    timed. With clock=time.process_time, what other processes do counts less.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        for name, work in contenders.items():
            start = clock()
            work()
            if repeat:
                seconds[name].append(clock() - start)
            if after:
                after[name]()
    return seconds


def table(title: str, seconds: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Print medians and their ratios to that of the contender `base`; return them as a dict."""
    print(f"\n{title:<28}{'median ms':>11}{'fastest ms':>12}   ratio to {base}")
    result = {}
    reference = statistics.median(seconds[base])
    for name, values in seconds.items():
        median = statistics.median(values)
        milliseconds = f"{1e3 * median:>11.2f}{1e3 * min(values):>12.2f}"
        print(f"  {name:<26}{milliseconds}   {median / reference:.3f}")
        result[name] = {"median_ms": 1e3 * median, "ratio": median / reference}
    return result
