"""What a single rank is worth: a score for each rank-one part of a pair, by a proxy or by chance.

    name | symbol  | shape
    part | B_k A_k | (out, in)  column k of lora_B with row k of lora_A
    A, B | A, B    | (r, in), (out, r)
    a, b |         | dL/dA, dL/dB, in the same shapes

What this file does not do: scores of whole modules (proxies.py), choices (single_ranks.py).
"""

import math
import warnings

from allocate import baseline_scores
from proxies import factor_gradients, refuse_unscorable

RANK_PROXIES = ("grad_norm", "snip")
CHOICES = (*RANK_PROXIES, "random")


def score_ranks(name, model, batches):
    """Score the rank-one parts of each pair: row k of A with column k of B.

    Args:
        name: one of RANK_PROXIES. model, batches: as in score.

    Returns:
        dict name -> list of r floats. For snip they sum to score("snip", …).

    Raises:
        ValueError: another proxy; or a score that is not finite.

    Warns:
        UserWarning: all scores are zero.
    """
    if name not in RANK_PROXIES:
        raise ValueError(
            f"proxy {name!r} does not tell ranks apart, allowed: {', '.join(RANK_PROXIES)}"
        )
    refuse_unscorable(model, batches)
    scores = part_scores(name, model, batches)
    if not any(map(any, scores.values())):
        warnings.warn(f"all {name} scores are zero: the choice is random", stacklevel=2)
    return scores


def part_scores(name, model, batches):
    """score_ranks without its door, for any model that factor_gradients takes."""
    scores = {}
    for module, ((A, a), (B, b)) in factor_gradients(model, batches).items():
        if name == "grad_norm":
            # S_k = ||dL/dA_k|| + ||dL/dB_k||
            parts = a.norm(dim=1) + b.norm(dim=0)  # (r,)
        else:
            # S_k = sum |A_k o dL/dA_k| + sum |B_k o dL/dB_k|
            parts = (A * a).abs().sum(1) + (B * b).abs().sum(0)  # (r,)
        scores[module] = parts.tolist()
        if not all(map(math.isfinite, scores[module])):
            raise ValueError(f"a {name} score of {module} is not finite: {scores[module]}")
    return scores


def random_ranks(costs, r, generator):
    """Scores of r parts a module that know nothing of the model: the baseline of score_ranks.

    Args:
        costs: dict name -> parameters of one part. r: int. generator: torch.Generator.
    """
    parts = {f"{name}/{k}": cost for name, cost in costs.items() for k in range(r)}
    scores = baseline_scores("random", parts, generator)
    return {name: [scores[f"{name}/{k}"] for k in range(r)] for name in costs}
