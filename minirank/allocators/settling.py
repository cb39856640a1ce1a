"""`SettlingAllocator`: allocators that know how sure their ranks are, and when to stop measuring.

`stability(budget)` asks which ranks would change within the sampling error of the scores.
`settle(budget)` measures, looks at the ranks, measures as much again, looks again, and so on, until
the ranks are sure enough. The methods differ in what they measure, and so in what the error is of:

    method           measures in   the error is that of
    SensitivityLoRA  batches       the calibration batches, and random vectors
    ShapLoRA         coalitions    the coalitions that were drawn; its validation data is taken as
                                   it is

Whoever looks often and stops at the first good look is fooled more often than by a single look. So
the looks share out the error that `confidence` leaves: α = 1 − confidence. Look k may be wrong with
probability α / (k (k + 1)), and the sum over all k is α, however many looks there are. (Spending
functions of this kind are due to Lan and DeMets, 1983.)
"""

from __future__ import annotations

import contextlib
import math
from abc import abstractmethod
from collections.abc import Generator
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..checks import is_integer, warn_caller
from .allocation import Unit
from .allocator import Allocator
from .constraints import Bound, Constraints
from .stability import Stability, check_draws

Measurement = TypeVar("Measurement")
Value = TypeVar("Value")


class Draws(NamedTuple):
    """How `stability` draws allocations within the errors of the scores."""

    confidence: float
    resamples: int
    generator: torch.Generator | int

    def of_look(self, look: int) -> Draws:
        """The confidence that look number `look` needs, so that all looks together keep this one,
        and as many draws as it takes to see so small an error."""
        error = (1 - self.confidence) / (look * (look + 1))
        return self._replace(
            confidence=1 - error, resamples=max(self.resamples, math.ceil(1 / error))
        )


class SettlingAllocator(Allocator, Generic[Measurement]):
    """An allocator with `stability` and `settle`. A method says what a measurement is."""

    def stability(
        self,
        budget: int,
        *,
        unit: Unit = "ranks",
        min_rank: Bound = 0,
        max_rank: Bound = None,
        confidence: float = 0.95,
        resamples: int = 300,
        generator: torch.Generator | int = 0,
    ) -> Stability:
        """Which ranks of `allocate(budget)` would change within the sampling error of the scores?

        For SensitivityLoRA the error is that of the batches as a sample of such data, random
        vectors included. (To see the Monte Carlo error of the random vectors alone, make one batch
        and give it many times.) For ShapLoRA it is that of the coalitions alone.

        A rank has changed when it is in another module. Which of its own ranks a module keeps is
        not asked.

        Args:
            budget, unit, min_rank, max_rank: as in `allocate`.
            confidence: the share of resampled allocations that the answer holds for.
            resamples: how many allocations are drawn within the errors.
            generator: a torch.Generator or a seed, for the draws. It does not change the scores.

        Raises:
            RuntimeError: `score` has not run, or its scores are stale; or it measured nothing that
                has an error: SensitivityLoRA without `groups`, ShapLoRA without coalitions.
            ValueError: as `allocate`; fewer than 4 batches; an option out of its range.
        """
        measurement = self._last_measurement()
        constraints = self._settling_constraints(budget, unit, min_rank, max_rank)
        return self._stability_of(measurement, constraints, Draws(confidence, resamples, generator))

    def settle(
        self,
        budget: int,
        *,
        max_moved: int = 0,
        unit: Unit = "ranks",
        min_rank: Bound = 0,
        max_rank: Bound = None,
        confidence: float = 0.95,
        resamples: int = 300,
        generator: torch.Generator | int = 0,
    ) -> Stability:
        """`score()`, but with no more measuring than it takes until the ranks are settled.

        SensitivityLoRA looks at `groups` batches, ShapLoRA at 18 coalitions, and both look again
        whenever their number has doubled, and at the end: when there are no more batches, or all
        `coalitions` are measured. They stop as soon as at most `max_moved` ranks would move. The
        scores are then those of `score()` with as many batches or coalitions.

        With probability `confidence` it does not happen that measuring stops while more than
        `max_moved` ranks are in other modules than endless measuring would put them in. This holds
        for all looks together, so that each of them needs more confidence than that. The result
        says what `stability` says of what was measured, with `confidence` for this look alone.

        Args:
            max_moved: how many ranks may still move.
            budget, unit, min_rank, max_rank, confidence, resamples, generator: as in `stability`.
                More allocations are drawn where a look's confidence takes more.

        Raises:
            RuntimeError: it measures nothing that has an error, as in `stability`.
            ValueError: as `score` and `stability`.

        Warns:
            UserWarning: the end has come, and the ranks are not settled. The scores are kept.
        """
        if not is_integer(max_moved, -math.inf):
            raise ValueError(f"max_moved must be an integer number of ranks, got {max_moved!r}")
        check_draws(confidence, resamples)
        constraints = self._settling_constraints(budget, unit, min_rank, max_rank)
        self._divide(self._equal_scores(), constraints)  # an impossible budget is told at once
        draws = Draws(confidence, resamples, generator)
        with contextlib.closing(self._looks()) as looks:
            for look, measurement in enumerate(looks, start=1):
                stability = self._agreed(self._stability_of(measurement, constraints, draws))
                moved = stability.max_moved
                if moved <= max_moved:
                    strict = self._stability_of(measurement, constraints, draws.of_look(look))
                    moved = self._agreed(strict.max_moved)
                if moved <= max_moved:
                    break
        if moved > max_moved:
            warn_caller(
                f"the ranks are not settled: {moved} of {stability.allocation.total_rank} may "
                f"still move, and max_moved={max_moved} was asked for, but all "
                f"{stability.measured} are measured. The scores are kept. {self._more}, or a "
                "larger max_moved"
            )
        self._adopt(measurement)
        return stability

    _more = ""  # what there must be more of, for the warning

    def _settling_constraints(
        self, budget: int, unit: Unit, min_rank: Bound, max_rank: Bound
    ) -> Constraints:
        return self._constraints(self._equal_scores(), budget, unit, min_rank, max_rank)

    @abstractmethod
    def _equal_scores(self) -> dict[str, Tensor]:
        """Scores of the right shapes."""

    @abstractmethod
    def _last_measurement(self) -> Measurement:
        """What the scores rest on. Raises RuntimeError if it does not tell how they vary."""

    @abstractmethod
    def _looks(self) -> Generator[Measurement, None, None]:
        """Measure step by step, with a pause at each look; at least one. What was measured until
        then is in the measurement. `_adopt` has not been called for any of them."""

    @abstractmethod
    def _stability_of(
        self, measurement: Measurement, constraints: Constraints, draws: Draws
    ) -> Stability:
        """`stability`, of this measurement."""

    @abstractmethod
    def _adopt(self, measurement: Measurement) -> dict[str, Tensor]:
        """Make a measurement the one that this object answers from: all of it or, if anything
        raises, nothing. Returns the scores."""

    def _agreed(self, value: Value) -> Value:
        """The same value on all processes that measure together, which stop together or not."""
        return value
