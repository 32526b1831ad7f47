"""allocate.py against brute force, and the rules of the released code on small cases."""

import itertools
import math

import pytest
import torch

import allocate
from relatives import rank_budget


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def names(n, place="q_proj"):
    return [f"layers.{i}.{place}" for i in range(n)]


def random_scores(n, seed=0, place="q_proj"):
    return dict(zip(names(n, place), torch.rand(n, generator=rng(seed)).tolist(), strict=True))


# ---------------------------------------------------------------------------------------- fractions


def test_counts_are_floor_for_modules_and_round_for_shortcuts():
    """48 and 95 at 0.25: 12 + 24, as the authors' runs; Python rounds 23.5 to 24 and 24.5 to 24."""
    scores = random_scores(48) | random_scores(95, 1, "residual_1")
    together = allocate.keep_top(scores, 0.25)
    apart = allocate.keep_top(scores, 0.25, together=False)
    assert len(together) == 36
    assert sum(allocate.is_shortcut(n) for n in apart) == 24 and len(apart) == 36
    assert together != apart
    for n, expected in ((94, 24), (98, 24), (102, 26)):
        assert len(allocate.keep_top(random_scores(n, 0, "shortcut_sa"), 0.25)) == expected
    assert len(allocate.keep_top(random_scores(51), 0.25)) == 12
    for n, keep, expected in ((90, 0.7, 63), (100, 0.29, 29), (50, 0.58, 29)):  # p n in floating
        assert keep * n < expected  # point falls below the whole number that it is
        assert len(allocate.keep_top(random_scores(n), keep)) == expected


@pytest.mark.parametrize("together", [True, False])
def test_the_best_are_kept(together):
    """Whatever is off scores no more than anything that is on, within its ranking."""
    scores = random_scores(20) | random_scores(20, 1, "shortcut_ffn")
    on = allocate.keep_top(scores, 0.3, together)
    groups = [scores] if together else [random_scores(20), random_scores(20, 1, "shortcut_ffn")]
    for group in groups:
        assert min(v for n, v in group.items() if n in on) > max(
            v for n, v in group.items() if n not in on
        )


def test_ties_at_the_cut_are_uniform_and_the_rest_is_fixed():
    """Two above, three tied for two places: each pair of the three comes up a third of the time."""
    scores = dict(zip(names(8), [5, 4, 3, 3, 3, 2, 1, 0], strict=True))
    generator, counts = rng(), {}
    before = torch.get_rng_state()
    for _ in range(3000):
        on = allocate.keep_top(scores, 0.5, generator=generator)
        assert {"layers.0.q_proj", "layers.1.q_proj"} < on and len(on) == 4
        key = tuple(sorted(on))
        counts[key] = counts.get(key, 0) + 1
    assert len(counts) == 3
    assert all(abs(c / 3000 - 1 / 3) < 0.04 for c in counts.values())
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is not touched


def test_ties_do_not_depend_on_the_order_of_the_names():
    tied = dict.fromkeys(names(10), 0.0)
    backwards = dict(reversed(tied.items()))
    for seed in range(5):
        first = allocate.keep_top(tied, 0.3, generator=rng(seed))
        assert first == allocate.keep_top(backwards, 0.3, generator=rng(seed))
        costs = dict.fromkeys(tied, 7)
        first = allocate.within_budget(tied, costs, 21, rng(seed))
        assert first == allocate.within_budget(backwards, costs, 21, rng(seed)) and len(first) == 3


def test_everything_and_no_shortcut():
    """keep 1 is allowed and keeps all; round(0.2 * 2) shortcuts are none, ranked apart."""
    scores = random_scores(5) | random_scores(2, 1, "residual_1")
    assert allocate.keep_top(scores, 1) == set(scores)
    assert allocate.keep_top(scores, 0.2, together=False) == {
        max(random_scores(5).items(), key=lambda x: x[1])[0]
    }


def test_without_a_generator_ties_are_those_of_seed_0():
    """As documented, so that a decision can be repeated; seed 1 would give another."""
    tied, costs = dict.fromkeys(names(10), 1.0), dict.fromkeys(names(10), 3)
    decisions = [
        lambda **by: allocate.keep_top(tied, 0.5, **by),
        lambda **by: allocate.within_budget(tied, costs, 15, **by),
        lambda **by: allocate.Reallocator(costs, mode="static", keep=0.5, **by).choose(tied, 0, 0),
    ]
    for decide in decisions:
        assert decide() == decide(generator=rng(0)) != decide(generator=rng(1))


def test_by_default_a_quarter_is_kept_in_one_ranking():
    scores = random_scores(8) | {n: v / 9 for n, v in random_scores(8, 1, "residual_1").items()}
    expected = set(sorted(scores, key=scores.get)[-4:])  # no shortcut is among them
    assert not any(map(allocate.is_shortcut, expected))
    plan = allocate.Reallocator(dict.fromkeys(scores, 9), mode="dynamic")
    assert allocate.keep_top(scores) == plan.choose(scores, 0, 0) == expected


@pytest.mark.parametrize("keep", [0, -0.1, 1.1, math.nan])
def test_keep_out_of_range(keep):
    with pytest.raises(ValueError, match="allowed: 0 < keep <= 1"):
        allocate.keep_top(random_scores(4), keep)


def test_nothing_to_keep_and_scores_that_are_not_finite():
    with pytest.raises(ValueError, match=r"keep 0\.2 of 4 modules is none"):
        allocate.keep_top(random_scores(4), 0.2)
    with pytest.raises(ValueError, match="no scores"):
        allocate.keep_top({}, 0.5)
    for bad in (math.nan, math.inf):
        for choose in (
            lambda s: allocate.keep_top(s, 0.5),
            lambda s: allocate.within_budget(s, dict.fromkeys(s, 1), 2),
        ):
            with pytest.raises(ValueError, match=r"the score of layers\.2\.q_proj is"):
                choose({**random_scores(4), "layers.2.q_proj": bad})


# ----------------------------------------------------------------------------------------- knapsack


def brute_force(scores, costs, budget):
    best = 0.0
    for size in range(len(scores) + 1):
        for subset in itertools.combinations(scores, size):
            if sum(costs[n] for n in subset) <= budget:
                best = max(best, sum(scores[n] for n in subset))
    return best


@pytest.mark.parametrize("kind", ["random", "few sizes", "ties", "value is weight", "negative"])
def test_the_chosen_set_is_the_best_there_is(kind):
    for seed in range(40):
        g = rng(seed)
        n = int(torch.randint(1, 11, (1,), generator=g))
        weights = torch.randint(1, 30, (n,), generator=g).tolist()
        values = torch.rand(n, generator=g).tolist()
        if kind == "few sizes":
            weights = [3 if w < 15 else 7 for w in weights]
        if kind == "ties":
            values = [1.0 if v < 0.5 else 2.0 for v in values]
        if kind == "value is weight":
            values = [float(w) for w in weights]
        if kind == "negative":
            values = [v - 0.3 for v in values]
            values[0] = 0.5
        scores = dict(zip(names(n), values, strict=True))
        costs = dict(zip(names(n), weights, strict=True))
        budget = int(torch.randint(min(weights), sum(weights) + 3, (1,), generator=g))
        on = allocate.within_budget(scores, costs, budget)
        assert sum(costs[x] for x in on) <= budget
        positive = {k: v for k, v in scores.items() if v > 0}
        best = brute_force(positive, costs, budget)
        if any(costs[x] <= budget for x in positive) and best > 0:
            assert sum(scores[x] for x in on) == pytest.approx(best, abs=1e-12)


def test_of_what_fits_some_is_chosen_where_the_only_positive_score_is_too_large():
    scores, costs = {"a": 1.0, "b": -1.0, "c": 0.0}, {"a": 100, "b": 10, "c": 10}
    chosen = {frozenset(allocate.within_budget(scores, costs, 15, rng(s))) for s in range(20)}
    assert chosen == {frozenset("c")}
    scores["b"] = 0.0
    chosen = {frozenset(allocate.within_budget(scores, costs, 15, rng(s))) for s in range(20)}
    assert chosen == {frozenset("b"), frozenset("c")}
    assert allocate.within_budget({"b": -1.0, "c": -5.0}, costs, 15) == {"b"}
    assert allocate.within_budget({"b": 1.0, "c": 0.0}, costs, 20) == {"b"}  # room is no reason


def test_a_score_that_a_sum_rounds_away_is_bought_where_it_fits():
    scores, costs = {"a": 1e30, "b": 1.0, "c": 2.0, "d": 1e-3}, dict(a=3, b=2, c=2, d=1)
    assert allocate.within_budget(scores, costs, 8) == {"a", "b", "c", "d"}
    assert allocate.within_budget(scores, costs, 6) == {"a", "c", "d"}
    assert allocate.within_budget(scores, costs, 4) == {"a", "d"}


def test_three_hundred_modules_of_mixed_size():
    """No brute force here: no swap of one module for another, and no addition, is better."""
    g = rng(3)
    scores = random_scores(300, 5)
    weights = torch.randint(1000, 20000, (300,), generator=g).tolist()
    costs = dict(zip(scores, weights, strict=True))
    budget = sum(weights) // 4
    on = allocate.within_budget(scores, costs, budget)
    left = budget - sum(costs[x] for x in on)
    assert left >= 0
    for out in set(scores) - on:
        assert costs[out] > left
        for x in on:
            fits = costs[out] - costs[x] <= left
            assert not (fits and scores[out] > scores[x])
    fraction, room = 0.0, budget  # the linear relaxation: an upper bound that is nearly reached
    for name in sorted(scores, key=lambda x: -scores[x] / costs[x]):
        part = min(1, room / costs[name])
        fraction, room = fraction + part * scores[name], room - part * costs[name]
    total = sum(scores[x] for x in on)
    assert fraction * 0.999 < total <= fraction + 1e-9


def test_a_budget_of_one_parameter_is_one():
    assert allocate.within_budget({"a": 0.5, "b": 0.4}, {"a": 1, "b": 1}, 1) == {"a"}


def test_more_than_everything_switches_everything_on():
    scores, costs = random_scores(5), dict.fromkeys(names(5), 10)
    assert allocate.within_budget(scores, costs, 10**9) == set(scores)


@pytest.mark.parametrize("budget", [0, -5, math.nan, math.inf, 9])
def test_impossible_budgets(budget):
    why = "less than the smallest module needs: 10" if budget == 9 else "allowed: a positive number"
    with pytest.raises(ValueError, match=f"the budget .*{why}"):
        allocate.within_budget(random_scores(3), dict.fromkeys(names(3), 10), budget)


# -------------------------------------------------------------------------------------------- ranks


def test_ranks_are_the_best_parts():
    g = rng(1)
    for _ in range(20):
        table = torch.rand(3, 3, generator=g).tolist()
        rank_scores = dict(zip(names(3), table, strict=True))
        rank_costs = dict(zip(names(3), (5, 9, 7), strict=True))
        kept = rank_budget.ranks_within_budget(rank_scores, rank_costs, 33)
        parts = {(n, k): s for n, row in rank_scores.items() for k, s in enumerate(row)}
        costs = {part: rank_costs[part[0]] for part in parts}
        chosen = [(n, k) for n, ks in kept.items() for k in ks]
        assert sum(costs[c] for c in chosen) <= 33
        best = brute_force(parts, costs, 33)
        assert sum(parts[c] for c in chosen) == pytest.approx(best, abs=1e-12)
        assert all(ks == sorted(set(ks)) for ks in kept.values())


def test_baselines():
    costs = {**dict.fromkeys(names(4), 10), **dict.fromkeys(names(2, "fc1"), 30)}
    by_size = allocate.baseline_scores("size", costs, rng())
    assert allocate.keep_top(by_size, 0.34) == set(names(2, "fc1"))
    first = allocate.baseline_scores("random", costs, rng(1))
    assert sorted(first.values()) == [(i + 1) / 6 for i in range(6)]
    assert first != allocate.baseline_scores("random", costs, rng(2))


# ----------------------------------------------------------------------------------------- schedule


def plan(mode="dynamic", every=0.2, budget=None):
    costs = dict.fromkeys(names(8), 10)
    return allocate.Reallocator(costs, mode=mode, budget=budget, every=every, generator=rng())


@pytest.mark.parametrize(
    ("steps", "every", "expected"),
    [
        (459, 0.2, [0, 92, 184, 276, 368]),  # MRPC, batch 8: the authors' recorded steps
        (312, 0.2, [0, 63, 126, 189, 252]),  # RTE
        (100, 0.07, list(range(0, 100, 7))),  # 0.07 * 100 is 7.000000000000001
        (10, 1.0, [0]),
        (3, 0.01, [0, 1, 2]),
    ],
)
def test_dynamic_schedule_counts_inside_each_epoch(steps, every, expected):
    p = plan(every=every)
    for epoch in (0, 1):
        assert [i for i in range(steps) if p.due(epoch * steps + i, i, steps)] == expected


def test_static_schedule_is_once():
    p = plan("static")
    assert [s for s in range(20) if p.due(s, s % 5, 5)] == [0]


def test_a_score_that_nothing_can_buy_does_not_blur_the_others():
    """Beside 1e300 the others are as good as 0, if it has a say in the scale."""
    scores, costs = {"big": 1e300, "a": 3e-30, "b": 2e-30, "c": 2e-30}, dict(big=99, a=6, b=5, c=5)
    assert allocate.within_budget(scores, costs, 10) == {"b", "c"}


def test_scores_whose_sum_overflows():
    """As of SYNFLOW in a deep model: the largest float64 is 1.8e308."""
    scores, costs = dict(a=1e308, b=1.2e308, c=1.7e308, d=1e308), dict(a=2, b=2, c=3, d=2)
    assert allocate.within_budget(scores, costs, 4) in ({"a", "b"}, {"b", "d"})
    assert allocate.within_budget(scores, costs, 3) == {"c"}


def test_a_plan_that_is_none_is_refused():
    costs = {"layers.0.q_proj": 24}
    for given, message in (
        (
            {"mode": "Static"},
            "mode Static every 1.0, allowed: static, dynamic",
        ),
        ({"mode": "dynamic", "every": 2.0}, "every 2.0, .* 0 < every <= 1"),
        ({"mode": "dynamic", "every": 0.0}, "every 0.0, allowed"),
    ):
        with pytest.raises(ValueError, match=message):
            allocate.Reallocator(costs, keep=1.0, **given)
    with pytest.raises(ValueError, match="kind is 'sizes', allowed: random, size"):
        allocate.baseline_scores("sizes", costs, rng())


def test_a_plan_without_a_decision_is_refused_when_it_is_made():
    costs = {"layers.0.q_proj": 24, "layers.0.fc1": 40}
    with pytest.raises(ValueError, match=r"keep 0\.25 of 2 modules is none"):
        allocate.Reallocator(costs, mode="static")
    with pytest.raises(ValueError, match=r"23 parameters is less than .* needs: 24$"):
        allocate.Reallocator(costs, mode="static", budget=23)
    with pytest.raises(ValueError, match=r"5 parameters is less than .* needs: 6$"):
        allocate.Reallocator(costs, mode="static", budget=5, parts=4)
    allocate.Reallocator(costs, mode="static", budget=6, parts=4)  # one rank of four


def test_history_and_state():
    p = plan()
    on = p.choose(random_scores(8, 1), step=0, epoch=0)
    p.choose(dict.fromkeys(names(8), 0.0), step=7, epoch=1)
    assert [(h["step"], h["epoch"]) for h in p.history] == [(0, 0), (7, 1)]
    assert p.history[0]["scores"] == random_scores(8, 1)
    assert {n for n, is_on in p.history[0]["on"].items() if is_on} == on and len(on) == 2
    twin = plan()
    twin.load(p.state())
    assert twin.history == p.history
    ties = dict.fromkeys(names(8), 1.0)
    assert twin.choose(ties, 9, 1) == p.choose(ties, 9, 1)
    assert len(plan(budget=35).choose(random_scores(8, 1), 0, 0)) == 3


# --------------------------------------------------------------------------------------------- grid


def test_grid():
    levels = {
        "layers.0.q_proj": 1.0,
        "layers.0.residual_1": 0.0,
        "layers.1.q_proj": 0.5,
        "layers.1.residual_1": 0.1,
        "layers.1.shortcut_ffn": 1.0,
    }
    costs = dict.fromkeys(levels, 80)
    assert allocate.grid(levels, costs, 300).split("\n") == [
        "       q_proj █▒",
        "   residual_1 ·░",
        " shortcut_ffn  █",
        "4 of 5 modules on, 208 parameters (budget 300, 92 left)",
    ]
    assert allocate.grid(levels, costs).endswith("208 parameters (all 400)")
    everything = allocate.grid(dict.fromkeys(levels, 1.0), costs, 1000)
    assert everything.endswith("the budget allows everything: all 5 modules on, 400 parameters")
