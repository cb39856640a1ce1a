"""shapley.py: games of known values, all orders by brute force, the axioms, how often a game is
asked."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirank import reference
from minirank.shapley import (
    coalition_masks,
    exact_shapley_values,
    sampled_shapley_values,
    standard_error,
)


def table_game(worth):
    """v(S) from a list of 2^n numbers, in the order of the binary numbers whose bit i is player
    i."""
    return lambda mask: worth[sum(2**i for i, present in enumerate(mask.tolist()) if present)]


def random_game(n, seed=0):
    return table_game(
        torch.randn(
            2**n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        ).tolist()
    )


def close(a, b, tolerance=1e-12):
    b = torch.as_tensor(b, dtype=torch.float64)
    assert a.dtype == torch.float64
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max())), (a, b)


# ---- games with known values -------------------------------------------------------------------


def test_an_additive_game_gives_the_weights():
    weights = torch.tensor([3.0, -1.0, 0.0, 2.5], dtype=torch.float64)
    close(exact_shapley_values(lambda mask: float(weights[mask].sum()) + 7, 4), weights)


@pytest.mark.parametrize(
    ("left", "right", "expected"), [(1, 2, [4 / 6, 1 / 6, 1 / 6]), (1, 1, [0.5, 0.5])]
)
def test_the_glove_game(left, right, expected):
    def pairs(mask):
        return float(min(mask[:left].sum(), mask[left:].sum()))

    close(exact_shapley_values(pairs, left + right), expected)


def test_the_airport_game():
    """A runway costs what the largest aeroplane in S needs: players share each stretch of it that
    they use."""
    cost = [8.0, 11.0, 13.0, 18.0]
    shares = [8 / 4, 8 / 4 + 3 / 3, 8 / 4 + 3 / 3 + 2 / 2, 8 / 4 + 3 / 3 + 2 / 2 + 5 / 1]
    close(
        exact_shapley_values(
            lambda m: max((c for c, x in zip(cost, m, strict=True) if x), default=0), 4
        ),
        shares,
    )


@pytest.mark.parametrize("needed", [[0], [1, 3], [0, 2, 4], [0, 1, 2, 3, 4]])
def test_a_unanimity_game_is_shared_by_those_who_are_needed(needed):
    expected = [1 / len(needed) if i in needed else 0 for i in range(5)]
    close(exact_shapley_values(lambda mask: float(mask[needed].all()), 5), expected)


@pytest.mark.parametrize("n", range(1, 7))
def test_random_games_against_all_orders(n):
    close(
        exact_shapley_values(random_game(n, seed=n), n),
        reference.exact_shapley_values(random_game(n, seed=n), n),
    )


def test_many_players():
    values = exact_shapley_values(lambda mask: float(mask[0]) + 3.0 * float(mask[13]), 14)
    close(values, [1.0, *[0.0] * 12, 3.0])


def test_twenty_players_are_not_refused():
    class AskedError(Exception):
        pass

    def game(mask):
        assert mask.shape == (20,)
        raise AskedError

    with pytest.raises(AskedError):
        exact_shapley_values(game, 20)


# ---- the axioms --------------------------------------------------------------------------------

players = st.integers(1, 5)
cases = settings(max_examples=250, deadline=None, derandomize=True)


def worths(n):
    return st.lists(st.floats(-100, 100), min_size=2**n, max_size=2**n)


@cases
@given(players.flatmap(worths))
def test_efficiency(worth):
    n = len(worth).bit_length() - 1
    total = exact_shapley_values(table_game(worth), n).sum()
    assert abs(total - (worth[-1] - worth[0])) < 1e-10


@cases
@given(st.integers(2, 5).flatmap(worths), st.data())
def test_symmetry(worth, data):
    """Players i and j that always add the same have the same value."""
    n = len(worth).bit_length() - 1
    i, j = data.draw(st.permutations(range(n)))[:2]

    def symmetric(mask):
        swapped = mask.clone()
        swapped[[i, j]] = mask[[j, i]]
        return (table_game(worth)(mask) + table_game(worth)(swapped)) / 2

    values = exact_shapley_values(symmetric, n)
    assert abs(values[i] - values[j]) < 1e-10


@cases
@given(players.flatmap(worths), st.data())
def test_dummy(worth, data):
    """A player that adds the same c to every coalition has value c."""
    n = len(worth).bit_length() - 1
    i, c = data.draw(st.integers(0, n - 1)), data.draw(st.floats(-10, 10))

    def game(mask):
        others = mask.clone()
        others[i] = False
        return table_game(worth)(others) + c * float(mask[i])

    assert abs(exact_shapley_values(game, n)[i] - c) < 1e-10


@cases
@given(
    players.flatmap(lambda n: st.tuples(worths(n), worths(n))), st.floats(-3, 3), st.floats(-3, 3)
)
def test_linearity(two, a, b):
    n = len(two[0]).bit_length() - 1
    v, w = map(table_game, two)
    together = exact_shapley_values(lambda mask: a * v(mask) + b * w(mask), n)
    close(together, a * exact_shapley_values(v, n) + b * exact_shapley_values(w, n), 1e-10)


# ---- how the game is asked ---------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_each_coalition_is_asked_once_in_the_stated_order(n):
    asked = []

    def game(mask):
        assert mask.dtype == torch.bool
        assert mask.shape == (n,)
        asked.append(sum(2**i for i in range(n) if mask[i]))
        mask.fill_(False)  # a game may write into its mask
        return 0.0

    exact_shapley_values(game, n)
    assert asked == list(range(2**n))


def test_tensors_and_integers_are_values_too():
    close(exact_shapley_values(lambda mask: mask.sum(), 3), [1.0, 1.0, 1.0])
    close(exact_shapley_values(lambda mask: 2 * int(mask[1]), 3), [0.0, 2.0, 0.0])


def test_a_value_may_come_with_its_graph():
    """Minus a loss, say. torch warns of a number taken from such a tensor, and the tests treat
    warnings as errors."""
    weights = torch.tensor([1.0, 2.0], requires_grad=True)
    close(exact_shapley_values(lambda mask: (weights * mask).sum(), 2), [1.0, 2.0])
    close(sampled_shapley_values(lambda mask: (weights * mask).sum(), 2).values, [1.0, 2.0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torchs_defaults_do_not_matter(dtype):
    """The meta device stands for an accelerator: nothing can be computed on it, so that one slip
    would show."""
    game = random_game(4)
    expected = [
        exact_shapley_values(game, 4),
        *sampled_shapley_values(game, 4, pairs=3),
        coalition_masks(50),
    ]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            results = [
                exact_shapley_values(game, 4),
                *sampled_shapley_values(game, 4, pairs=3),
                coalition_masks(50),
            ]
    finally:
        torch.set_default_dtype(before)
    assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize(
    ("n", "match"),
    [
        (
            21,
            r"2\^21 coalitions; exact Shapley values are for at most 20 players: "
            "take sampled_shapley_values",
        ),
        (0, "n_players must be an integer of at least 1, got 0"),
        (-1, "at least 1"),
        (2.0, "integer"),
        (True, "integer"),
    ],
)
def test_impossible_numbers_of_players_are_told_before_anything_is_asked(n, match):
    with pytest.raises(ValueError, match=match):
        exact_shapley_values(lambda mask: pytest.fail("asked"), n)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_worth_that_is_not_finite_is_an_error(bad):
    def game(mask):
        return bad if mask.tolist() == [True, False, True] else 0.0

    with pytest.raises(ValueError, match=r"players \[0, 2\] is worth (nan|inf)"):
        exact_shapley_values(game, 3)
    with pytest.raises(ValueError, match=r"players \[0, 2\] is worth"):
        sampled_shapley_values(game, 3, pairs=50)


# ---- sampling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 6])
def test_sampling_asks_as_often_as_it_says_with_orders_and_their_reverse(n):
    asked = []

    def game(mask):
        asked.append(mask.tolist())
        mask.fill_(False)
        return 0.0

    sampled_shapley_values(game, n, pairs=7)
    assert len(asked) == 2 + 2 * 7 * (n - 1)
    if n > 1:
        forwards = asked[2 : 2 + n - 1]
        backwards = asked[2 + n - 1 : 2 + 2 * (n - 1)]
        assert [sum(mask) for mask in forwards] == list(range(1, n))
        complements = [[not x for x in mask] for mask in reversed(forwards)]
        assert backwards == complements


def test_one_pair_is_exact_where_players_interact_two_by_two():
    n, generator = 7, torch.Generator().manual_seed(1)
    single = torch.randn(n, generator=generator, dtype=torch.float64)
    double = torch.randn(n, n, generator=generator, dtype=torch.float64).triu(1)

    def game(mask):
        x = mask.double()
        return float(single @ x + x @ double @ x)

    sampled = sampled_shapley_values(game, n, pairs=2)
    close(sampled.values, single + (double.sum(0) + double.sum(1)) / 2)
    assert sampled.standard_errors.max() < 1e-14
    close(sampled.values, exact_shapley_values(game, n))


def test_sampling_is_unbiased_with_honest_standard_errors():
    n, seeds = 6, 200
    game = random_game(n, seed=3)
    exact = exact_shapley_values(game, n)
    runs = [sampled_shapley_values(game, n, pairs=20, generator=seed) for seed in range(seeds)]
    values, errors = (
        torch.stack([getattr(r, name) for r in runs]) for name in ("values", "standard_errors")
    )
    # The mean of 200 runs is within 4.5 of its own standard errors (7e-6 by chance, times 6
    # players).
    assert ((values.mean(0) - exact).abs() < 4.5 * values.std(0) / math.sqrt(seeds)).all()
    # The stated variance agrees with the true one. Either has a relative error of about 0.1 here.
    ratio = errors.square().mean(0) / values.var(0)
    assert ((ratio > 0.6) & (ratio < 1.6)).all(), ratio


def test_each_sample_is_efficient():
    sampled = sampled_shapley_values(random_game(5), 5, pairs=3)
    game = random_game(5)
    total = game(torch.ones(5, dtype=torch.bool)) - game(torch.zeros(5, dtype=torch.bool))
    assert abs(sampled.values.sum() - total) < 1e-12


def test_one_seed_one_estimate():
    game = random_game(5)
    one, two, other = (
        sampled_shapley_values(game, 5, pairs=4, generator=g).values for g in (1, 1, 2)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    state = torch.get_rng_state()
    again = sampled_shapley_values(
        game, 5, pairs=4, generator=torch.Generator().manual_seed(1)
    ).values
    assert torch.equal(again, one)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("options", [{"pairs": 1}, {"pairs": 2.5}, {"n_players": 0}])
def test_impossible_samples_are_errors(options):
    with pytest.raises(ValueError, match=rf"{next(iter(options))} must be an integer of at least"):
        sampled_shapley_values(lambda mask: 0.0, **{"n_players": 3, **options})


def test_standard_error_by_hand():
    assert standard_error(torch.tensor([[1.0, 2.0], [3.0, 2.0]])).tolist() == [
        1.0,
        0.0,
    ]  # stdev sqrt(2) / sqrt(2)


# ---- coalitions --------------------------------------------------------------------------------


@pytest.mark.parametrize("coalitions", [18, 90, 900])
@pytest.mark.parametrize("n", [1, 7, 144])
def test_coalitions_come_with_their_complements_so_that_everyone_is_in_half(n, coalitions):
    masks = coalition_masks(n, coalitions, generator=n)
    assert masks.shape == (coalitions, n)
    assert masks.dtype == torch.bool
    assert torch.equal(masks[0::2], ~masks[1::2])
    assert masks.sum(0).tolist() == [coalitions // 2] * n


def test_the_shares_are_the_papers():
    n = 20_000
    shares = coalition_masks(n, 90, generator=5)[0::2].double().mean(1)
    p = torch.tensor([k / 10 for k in range(1, 10)] * 5, dtype=torch.float64)
    # Five standard deviations of a mean of n Bernoulli draws: 6e-7 by chance, 45 times.
    assert ((shares - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()


def test_players_and_repeats_are_independent():
    masks = coalition_masks(300, 900, generator=6)[0::2].double()
    first = masks.reshape(50, 9, 300)[:, 4]  # p = 0.5
    assert (
        abs(float(torch.corrcoef(first.T).triu(1).mean())) < 0.01
    )  # between players, 44,850 pairs
    assert abs(float(torch.corrcoef(first).triu(1).mean())) < 0.01  # between repeats


def test_coalitions_follow_their_generator():
    one, two, other = (
        coalition_masks(40, generator=g) for g in (3, torch.Generator().manual_seed(3), 4)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("coalitions", [0, 17, 91, 18.0, True, -18])
def test_coalitions_are_a_multiple_of_18(coalitions):
    with pytest.raises(
        ValueError, match=r"coalitions must be (a multiple of 18|an integer of at least 18)"
    ):
        coalition_masks(3, coalitions)
