"""Single ranks: the budget is spent on rank-one parts, so that every module gets its own rank.

HeteroLoRA (arXiv 2406.14956) switches whole modules of one rank. Here the unit of a decision is the
rank-one part B_k A_k: column k of lora_B with row k of lora_A. --per-rank yes.

    name   | symbol | shape
    part   | B_k A_k | (out, in), of rank one; its cost is in + out parameters
    kept   |        | list of the indices k that a module keeps

What this file does not do: decide again on the way (the parts that are not kept are gone).
"""

import math

import lora
from allocate import within_budget
from proxies import factor_gradients
from support import distributed

RANK_PROXIES = ("grad_norm", "snip")


def score_ranks(name, model, batches):
    """Score the rank-one parts of each pair: row k of A with column k of B.

    Args:
        name: one of RANK_PROXIES. model, batches: as in score.

    Returns:
        dict name -> list of r floats. For snip they sum to score("snip", …).

    Raises:
        ValueError: another proxy; or a score that is not finite.
    """
    if name not in RANK_PROXIES:
        raise ValueError(
            f"proxy {name!r} does not tell ranks apart, allowed: {', '.join(RANK_PROXIES)}"
        )
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


def ranks_within_budget(rank_scores, rank_costs, budget, generator=None):
    """Each module gets r_i in {0 … r}: the best rank-one parts that fit, an exact 0/1 knapsack.

    Args:
        rank_scores: dict name -> list of r floats, the saliency of each rank-one part.
        rank_costs: dict name -> int, parameters of one rank, in + out.
        budget, generator: as in within_budget.

    Returns:
        dict name -> sorted list of the ranks (indices into 0 … r - 1) that are kept; [] = off.

    Raises:
        ValueError: as within_budget.
    """
    scores, costs = {}, {}
    for name, parts in rank_scores.items():
        for k, saliency in enumerate(parts):
            scores[f"{name}/{k}"], costs[f"{name}/{k}"] = saliency, rank_costs[name]
    chosen = within_budget(scores, costs, budget, generator)
    return {
        name: [k for k in range(len(parts)) if f"{name}/{k}" in chosen]
        for name, parts in rank_scores.items()
    }


def decide(model, plan, proxy, batches, step, epoch):
    """One decision about single ranks: score, choose, shrink; put on record in the plan.

    Args:
        model: model.Transformer with adapters of one rank; they shrink, so build the optimizer
            afterwards.
        plan: allocate.Reallocator with a budget.
        proxy: one of RANK_PROXIES. batches: as in proxies.score. step, epoch: where the run stands.
    """
    layers = lora.adapters(model)
    costs = {name: cost // layers[name].r for name, cost in plan.costs.items()}
    scores = distributed.mean_scores(score_ranks(proxy, model, batches))
    kept = ranks_within_budget(scores, costs, plan.budget, plan.generator)
    plan.record(step, epoch, scores, kept)
    for name, layer in layers.items():
        layer.enabled = bool(kept[name])
        if kept[name] and len(kept[name]) < layer.r:
            layer.keep_ranks(kept[name])


def shrink_to(model, parameters):
    """Shrink each module to the rank that its stored lora_A has, before a checkpoint is put back.

    Args:
        parameters: dict name -> tensor, as lora.trainable names them.
    """
    for name, layer in lora.adapters(model).items():
        stored = parameters.get(f"{name}.lora_A", layer.lora_A)
        if len(stored) < layer.r:
            layer.keep_ranks(list(range(len(stored))))
