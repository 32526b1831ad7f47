"""The best rank-one parts that a budget buys: single ranks, in names and numbers only.

    name | symbol | meaning
    part | k      | "module/k", rank k of a module; all parts of a module cost the same, in + out
    r_i  | r_i    | how many parts module i keeps

What this file does not do: score (rank_scores.py), switch or shrink a module (single_ranks.py).
"""

import torch

from allocate import top, within_budget


def ranks_within_budget(rank_scores, rank_costs, budget, generator=None, one_each=False):
    """Each module gets r_i in {0 … r}: the best rank-one parts that fit, an exact 0/1 knapsack.

    With one_each r_i >= 1. All parts of a module cost the same, so the best set with one of each
    holds the best part of each, and the best of the others that the rest of the budget buys.

    Args:
        rank_scores: dict name -> list of r floats, the score of each rank-one part.
        rank_costs: dict name -> int, parameters of one rank, in + out.
        budget, generator: as in within_budget.
        one_each: bool, every module keeps one part at least.

    Returns:
        dict name -> sorted list of the ranks (indices into 0 … r - 1) that are kept; [] = off.

    Raises:
        ValueError: as within_budget; or a budget that does not give every module one part.
    """
    if one_each:
        refuse_less_than_one_each(rank_costs, budget)
    generator = generator or torch.Generator().manual_seed(0)
    scores, costs, chosen = {}, {}, set()
    for name, parts in sorted(rank_scores.items()):  # ties do not depend on the order of names
        own = {f"{name}/{k}": score for k, score in enumerate(parts)}
        if one_each:
            [best] = top(own, 1, generator)
            chosen.add(best)
            budget -= rank_costs[name]
            del own[best]
        scores |= own
        costs |= dict.fromkeys(own, rank_costs[name])
    if not one_each or any(cost <= budget for cost in costs.values()):
        chosen |= within_budget(scores, costs, budget, generator)
    return {
        name: [k for k in range(len(parts)) if f"{name}/{k}" in chosen]
        for name, parts in rank_scores.items()
    }


def refuse_less_than_one_each(rank_costs, budget):
    """Raises ValueError where a budget does not give every module one rank."""
    least = sum(rank_costs.values())
    if budget < least:
        raise ValueError(
            f"the budget of {budget} parameters is less than one rank in each of "
            f"{len(rank_costs)} modules needs: {least}"
        )
