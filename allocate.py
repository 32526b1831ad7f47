"""Which modules are on: scores and a budget in, a set of names out (arXiv 2406.14956).

    keep_top        the paper's budget: a fraction of the modules, the best by score
    within_budget   at most so many trainable parameters, the best set there is (0/1 knapsack)
    Reallocator     when to decide (static, dynamic), what was decided, the generator of the ties
    grid            a decision as text

    name   | symbol | meaning
    keep   | p      | fraction of the modules that are on
           | n_l    | number of LoRA modules on linear layers
           | n_s    | number of LoRA-adapted shortcuts
    cost   |        | trainable parameters of a module, r (in + out)
    budget |        | number of trainable parameters that may be on at once

Names are those of lora.adapters ("layers.3.q_proj"). Every function takes names and numbers only,
so that it can be checked by brute force. Ties come from a generator that is passed in, and do not
depend on the order of the names. keep_top and the schedule follow the released
dyrealloc_callback.py, but for what docs/deviations.md says of ties, budgets and steps.

What this file does not do: touch a model or a tensor of one (lora.switch does), compute scores.
"""

import math

import numpy as np
import torch

BASELINES = ("random", "size")


def is_shortcut(name):
    """Whether a module sits on a shortcut: residual_1, residual_2, shortcut_sa, shortcut_ffn."""
    return name.rpartition(".")[2].startswith(("residual_", "shortcut_"))


def shuffled(names, generator):
    """The names in random order, whatever order they came in."""
    names = sorted(names)
    return [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]


def baseline_scores(kind, costs, generator):
    """Scores that know nothing of the model: "random", or "size" (more parameters = keep).

    Every proxy has these for company: one that does not beat them says nothing.

    Args:
        kind: one of BASELINES. costs: dict name -> parameters. generator: torch.Generator.

    Returns:
        dict name -> float > 0. With "random" every order is equally likely; a budget in
        parameters buys more modules where they are small.

    Raises:
        ValueError: another kind.
    """
    if kind not in BASELINES:
        raise ValueError(f"kind is {kind!r}, allowed: {', '.join(BASELINES)}")
    if kind == "size":
        return {name: float(cost) for name, cost in costs.items()}
    order = shuffled(costs, generator)
    return {name: (1.0 + order.index(name)) / len(order) for name in costs}


# ------------------------------------------------------------------------------ fraction of modules


def top(scores, count, generator):
    """The `count` best names. Ties at the cut alone are drawn: all above it are on."""
    ranked = sorted(scores.values(), reverse=True)
    if count == 0:
        return set()
    cut = ranked[count - 1]
    above = {name for name, value in scores.items() if value > cut}
    tied = [name for name, value in scores.items() if value == cut]
    return above | set(shuffled(tied, generator)[: count - len(above)])


def keep_counts(names, keep):
    """How many LoRA modules and how many shortcuts a fraction keeps.

    Python's round takes halves to the even number, as the released code does.

    Raises:
        ValueError: keep out of range, or nothing to keep.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep}, allowed: 0 < keep <= 1")
    shortcuts = sum(map(is_shortcut, names))
    n_l, n_s = len(names) - shortcuts, shortcuts
    # floor(p n_l) LoRA modules, round(p n_s) shortcuts; p n_l exact: 0.7 * 90 is 62.99999999999999
    counts = math.floor(round(keep * n_l, 9)), round(round(keep * n_s, 9))
    if sum(counts) == 0:
        raise ValueError(
            f"keep {keep} of {len(names)} modules is none: raise it, or adapt more modules"
        )
    return counts


def keep_top(scores, keep=0.25, together=True, generator=None):
    """The best floor(p n_l) + round(p n_s) modules: the paper's budget.

    Args:
        scores: dict name -> float; larger = keep.
        keep: p, 0 < p <= 1.
        together: one ranking of LoRA modules and shortcuts (released: "combined"); else
            floor(p n_l) LoRA modules and round(p n_s) shortcuts, ranked apart ("separated").
        generator: torch.Generator for ties; None = one that is seeded with 0.

    Returns:
        set of names.

    Raises:
        ValueError: keep out of range, no scores, a score that is not finite (the released code
            switches on the first modules of an all-NaN list), or nothing to keep.
    """
    refuse_not_finite(scores)
    n_modules, n_shortcuts = keep_counts(scores, keep)
    generator = generator or torch.Generator().manual_seed(0)
    if together:
        return top(scores, n_modules + n_shortcuts, generator)
    modules = {name: value for name, value in scores.items() if not is_shortcut(name)}
    shortcuts = {name: value for name, value in scores.items() if is_shortcut(name)}
    return top(modules, n_modules, generator) | top(shortcuts, n_shortcuts, generator)


def refuse_not_finite(scores):
    """Raises ValueError where there is no score, or one that is not finite."""
    if not scores:
        raise ValueError("no scores: nothing to allocate")
    for name, value in scores.items():
        if not math.isfinite(value):
            raise ValueError(f"the score of {name} is {value}: no allocation from scores like that")


# ----------------------------------------------------------------------------- number of parameters


def check_budget(budget, costs):
    """Raises ValueError where no module fits, or the budget is no number."""
    smallest = min(costs.values())
    if not (budget > 0 and math.isfinite(budget)):
        raise ValueError(f"the budget is {budget} parameters, allowed: a positive number")
    if budget < smallest:
        raise ValueError(
            f"the budget of {budget} parameters is less than the smallest module needs: {smallest}"
        )


def within_budget(scores, costs, budget, generator=None):
    """The set with the largest sum of scores whose parameters fit: an exact 0/1 knapsack.

    Where no module that fits has a positive score they are taken by score, best first and ties in
    random order, each that still fits.

    Args:
        scores: dict name -> float; larger = keep. 0 or below: never chosen beside a positive one
            that fits, even where there is room.
        costs: dict name -> int, trainable parameters, > 0.
        budget: number of parameters.
        generator: torch.Generator for ties; None = one that is seeded with 0.

    Returns:
        set of names; the sum of their costs is <= budget.

    Raises:
        ValueError: a budget that is not positive or fits no module; a score that is not finite.
    """
    refuse_not_finite(scores)
    check_budget(budget, costs)
    generator = generator or torch.Generator().manual_seed(0)
    order = shuffled(scores, generator)
    useful = [name for name in order if scores[name] > 0 and costs[name] <= budget]
    # Scaled by a power of two: no digit changes, and no sum overflows.
    largest = max((scores[name] for name in useful), default=1.0)
    values = np.ldexp([scores[name] for name in useful], -math.frexp(largest)[1])
    weights = np.array([costs[name] for name in useful], dtype=np.int64)
    chosen = {useful[i] for i in knapsack(values, weights, budget)}
    # What the sums of the knapsack rounded away, 1 beside 1e30, is bought with what is left.
    left = budget - sum(costs[name] for name in chosen)
    for name in sorted(useful or order, key=scores.get, reverse=True):
        if name not in chosen and costs[name] <= left:
            chosen.add(name)
            left -= costs[name]
    return chosen


def knapsack(values, weights, budget):
    """Indices of a subset with the largest sum of values among those of weight <= budget.

    Dynamic programming over undominated states (weight, value), Nemhauser & Ullmann 1969. The items
    come by value per weight, best first, and each makes two states of one: without it, and with it.
    Dropped is what is heavier than the budget; what is no lighter and no better than another state;
    and what cannot reach the value that another state reaches already, when both are filled up with
    the items to come. Exact up to the rounding of the sums.

    Args:
        values: (n,) float64 > 0; n may be 0. weights: (n,) int64 > 0, each <= budget.
    """
    order = np.argsort(-values / weights, kind="stable")
    v, w = values[order], weights[order]
    sum_v, sum_w = np.append(0.0, v.cumsum()), np.append(0, w.cumsum())  # (n + 1,), of the first k
    per_weight, slack = np.append(v / w, 0.0), 1e-12 * v.sum()
    state_w, state_v, history = np.zeros(1, np.int64), np.zeros(1), []
    for i in range(len(v)):
        new_w = np.concatenate([state_w, state_w + w[i]])  # (2 states,)
        new_v = np.concatenate([state_v, state_v + v[i]])
        index = np.flatnonzero(new_w <= budget)
        # Items i + 1 … stop - 1 still fit, whole (lower), and of the next one a part (upper).
        reach = sum_w[i + 1] + budget - new_w[index]
        stop = np.searchsorted(sum_w, reach, side="right") - 1
        lower = new_v[index] + sum_v[stop] - sum_v[i + 1]
        upper = lower + (reach - sum_w[stop]) * per_weight[stop]
        index = index[upper >= lower.max() - slack]
        index = index[np.lexsort((-new_v[index], new_w[index]))]  # by weight, then best first
        best_before = np.maximum.accumulate(np.append(-1.0, new_v[index]))[:-1]
        index = index[new_v[index] > best_before]
        history.append(np.divmod(index, len(state_w)))  # (whether with item i, state before)
        state_w, state_v = new_w[index], new_v[index]
    chosen, state = [], int(np.argmax(state_v))
    for item, (taken, before) in zip(order[::-1], history[::-1], strict=True):
        if taken[state]:
            chosen.append(int(item))
        state = int(before[state])
    return chosen


# ------------------------------------------------------------------------------- when, and what was


def interval(every, steps_per_epoch):
    """Steps between two decisions: ceil(every * steps_per_epoch), 1 at least."""
    exact = round(every * steps_per_epoch, 9)  # 0.07 * 100 is 7.000000000000001
    return max(1, math.ceil(exact))


class Reallocator:
    """The schedule of allocations, their history, and the generator that breaks ties.

    Args:
        costs: dict name -> parameters of the module when it is on, in the order of lora.adapters.
        mode: "static" (once, before training) or "dynamic" (and again every `every` epochs).
        keep: fraction of modules that stay on; used where budget is None.
        budget: number of adapter parameters, or None.
        every: fraction of an epoch between two decisions, 0 < every <= 1.
        together: as in keep_top.
        generator: torch.Generator, for ties and for the baseline "random"; None = seeded with 0.
        parts: int, into how many equal parts a module can be divided (single ranks: r).

    Raises:
        ValueError: no decision is possible: mode, every, keep or budget is out of range, or nothing
            is kept.
    """

    def __init__(
        self,
        costs,
        *,
        mode,
        keep=0.25,
        budget=None,
        every=1.0,
        together=True,
        generator=None,
        parts=1,
    ):
        self.costs, self.mode, self.keep, self.budget = costs, mode, keep, budget
        self.every, self.together = every, together
        self.generator = generator or torch.Generator().manual_seed(0)
        self.history = []
        if mode not in ("static", "dynamic") or not 0 < every <= 1:
            raise ValueError(f"mode {mode} every {every}, allowed: static, dynamic; 0 < every <= 1")
        if budget is None:
            keep_counts(costs, keep)
        else:
            check_budget(budget, {name: cost // parts for name, cost in costs.items()})

    def due(self, step, step_in_epoch, steps_per_epoch):
        """Whether to decide before this step.

        Static: before the first. Dynamic: at every ceil(every * steps_per_epoch) steps, counted
        anew in each epoch, the first before the first update (released: batch_idx % N == 0).
        """
        if self.mode == "static":
            return step == 0
        return step_in_epoch % interval(self.every, steps_per_epoch) == 0

    def choose(self, scores, step, epoch):
        """A decision from scores, put on record; returns the set of names that are on.

        Raises:
            ValueError: as keep_top or within_budget.
        """
        if self.budget is None:
            on = keep_top(scores, self.keep, self.together, self.generator)
        else:
            on = within_budget(scores, self.costs, self.budget, self.generator)
        self.record(step, epoch, scores, {name: name in on for name in self.costs})
        return on

    def record(self, step, epoch, scores, on):
        """Append a decision: scores by module (or rank), and what is on (true/false, or ranks)."""
        self.history.append({"step": step, "epoch": epoch, "scores": scores, "on": on})

    def state(self):
        """What a checkpoint keeps."""
        return {"history": self.history, "rng": self.generator.get_state()}

    def load(self, state):
        """Go on from what state() gave."""
        self.history = state["history"]
        self.generator.set_state(state["rng"])


# --------------------------------------------------------------------------------------------- grid


def grid(levels, costs, budget=None, spent=None):
    """A decision as text: a row for each place, a column for each block; and what it spends.

    Args:
        levels: dict name -> share of the module that is on: 0 … 1 (on/off, or r_i / r).
        costs: dict name -> parameters when it is whole.
        budget: number of parameters, or None.
        spent: number of parameters, where modules share some; None = the sum over what is on.

    Returns:
        str of several lines; · = off, ░ ▒ ▓ █ = up to 25, 50, 75, 100 % of the ranks, space = no
        such module.
    """
    places = list(dict.fromkeys(name.rpartition(".")[2] for name in levels))
    blocks = 1 + max(int(name.split(".")[1]) for name in levels)
    shade = " ░▒▓█"
    lines = []
    for place in places:
        cells = [levels.get(f"layers.{i}.{place}") for i in range(blocks)]
        text = "".join(
            " " if c is None else "·" if c == 0 else shade[math.ceil(4 * c)] for c in cells
        )
        lines.append(f"{place:>13} {text}")
    if spent is None:
        spent = sum(round(costs[name] * level) for name, level in levels.items())
    total = sum(costs.values())
    on = sum(level > 0 for level in levels.values())
    if budget is not None and spent == total:
        text = f"the budget allows everything: all {on} modules on, {total:,} parameters"
        return "\n".join([*lines, text])
    against = f"all {total:,}" if budget is None else f"budget {budget:,}, {budget - spent:,} left"
    lines.append(f"{on} of {len(levels)} modules on, {spent:,} parameters ({against})")
    return "\n".join(lines)
