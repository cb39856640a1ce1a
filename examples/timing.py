"""Timings that can be compared: all contenders in one process, in turn, and medians of the repeats."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

Work = Callable[[], object]


def interleaved(
    contenders: Mapping[str, Work], repeats: int, after: Mapping[str, Work] | None = None
) -> dict[str, list[float]]:
    """Seconds of each repeat, contenders taking turns; the first round is not counted, nor is what runs `after`."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        for name, work in contenders.items():
            start = time.perf_counter()
            work()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
            if after:
                after[name]()
    return seconds


def table(title: str, seconds: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Print medians and their ratios to the contender `base`; the same as a dict."""
    print(f"\n{title:<28}{'median ms':>11}{'fastest ms':>12}   ratio to {base}")
    result = {}
    reference = statistics.median(seconds[base])
    for name, values in seconds.items():
        median = statistics.median(values)
        print(
            f"  {name:<26}{1e3 * median:>11.2f}{1e3 * min(values):>12.2f}   {median / reference:.3f}"
        )
        result[name] = {"median_ms": 1e3 * median, "ratio": median / reference}
    return result
