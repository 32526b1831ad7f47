"""Single ranks: the budget is spent on rank-one parts, so that every module gets its own rank.

HeteroLoRA (arXiv 2406.14956) switches whole modules of one rank. Here the unit of a decision is the
rank-one part B_k A_k: column k of lora_B with row k of lora_A. --per-rank yes.

    name   | symbol  | shape
    part   | B_k A_k | (out, in), of rank one; its cost is in + out parameters
    kept   |         | list of the indices k that a module keeps

Static: once, before training; what is not kept is gone, and a module may keep nothing. Dynamic:
the factors keep their full shape, parts go off and return (ranks_off in lora.py), and every module
keeps one part at least. Off means to a part what it means to a module: no gradient, no step, no
decay, and its row, column and moments wait for its return.

What this file does not do: move A, B or W (the optimizer, delta_lora.py).
"""

import math

import torch
from torch import nn

import lora
from allocate import baseline_scores, top, within_budget
from proxies import factor_gradients, refuse_unscorable
from support import distributed

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
    """
    if name not in RANK_PROXIES:
        raise ValueError(
            f"proxy {name!r} does not tell ranks apart, allowed: {', '.join(RANK_PROXIES)}"
        )
    refuse_unscorable(model, batches)
    return part_scores(name, model, batches)


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


def ranks_within_budget(rank_scores, rank_costs, budget, generator=None, one_each=False):
    """Each module gets r_i in {0 … r}: the best rank-one parts that fit, an exact 0/1 knapsack.

    With one_each r_i >= 1. All parts of a module cost the same, so the best set with one of each
    holds the best part of each, and the best of the others that the rest of the budget buys.

    Args:
        rank_scores: dict name -> list of r floats, the saliency of each rank-one part.
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
    for name, parts in rank_scores.items():
        own = {f"{name}/{k}": saliency for k, saliency in enumerate(parts)}
        if one_each:
            best = top(own, 1, generator)
            chosen |= best
            budget -= rank_costs[name]
            own = {part: saliency for part, saliency in own.items() if part not in best}
        scores |= own
        costs |= dict.fromkeys(own, rank_costs[name])
    if not one_each or budget >= min(costs.values(), default=math.inf):
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


def decide(model, plan, proxy, batches, step, epoch):
    """One decision about single ranks: score, choose, switch or shrink; put on record in the plan.

    Args:
        model: model.Transformer with adapters of one rank. With a static plan they shrink, so
            build the optimizer afterwards; with a dynamic one ranks go on and off.
        plan: allocate.Reallocator with a budget.
        proxy: one of CHOICES. batches: as in proxies.score. step, epoch: where the run stands.
    """
    layers, dynamic = lora.adapters(model), plan.mode == "dynamic"
    r = next(iter(layers.values())).r
    costs = {name: cost // r for name, cost in plan.costs.items()}
    if proxy == "random":
        scores = random_ranks(costs, r, plan.generator)
    else:
        scores = distributed.mean_scores(score_ranks(proxy, model, batches))
    kept = ranks_within_budget(scores, costs, plan.budget, plan.generator, one_each=dynamic)
    plan.record(step, epoch, scores, kept)
    for name, layer in layers.items():
        layer.enabled = bool(kept[name])
        if dynamic:
            layer.ranks_off = [k for k in range(r) if k not in kept[name]]
        elif kept[name] and len(kept[name]) < layer.r:
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


class RankSteps:
    """Two calls around optimizer.step() that let it step single ranks: those that are on.

    To the optimizer every row of lora_A and every column of lora_B is a parameter of its own, with
    moments and a step count of its own; AdamW on a whole factor would decay and move what is off.
    before_step() hands out values and gradients of what is on, after_step() takes the values back.
    What is off gets no gradient, and the optimizer leaves it alone altogether.

    Args:
        model: model.Transformer with adapters, on its device.
    """

    def __init__(self, model):
        self.layers = lora.adapters(model)
        pairs = {id(f) for layer in self.layers.values() for f in layer.factors().values()}
        self.rest = [p for p in lora.trainable(model).values() if id(p) not in pairs]  # the head
        self.parts = {  # name -> [(row k of A (in,), column k of B (out,))]
            name: [
                (nn.Parameter(row.clone()), nn.Parameter(column.clone()))
                for row, column in zip(layer.lora_A.detach(), layer.lora_B.detach().T, strict=True)
            ]
            for name, layer in self.layers.items()
        }

    def parameters(self):
        """What an optimizer is built on: the parts, then the head; in a fixed order."""
        pairs = [pair for parts in self.parts.values() for pair in parts]
        return [*(p for pair in pairs for p in pair), *self.rest]

    def adamw(self, lr, weight_decay):
        """AdamW over parameters()."""
        return torch.optim.AdamW(self.parameters(), lr=lr, weight_decay=weight_decay, fused=True)

    def on(self):
        """(layer, k, row, column) of every part that is on."""
        return [
            (layer, k, *self.parts[name][k])
            for name, layer in self.layers.items()
            for k in range(layer.r)
            if k not in layer.ranks_off
        ]

    @torch.no_grad()
    def before_step(self):
        """Call after backward (and clipping), before optimizer.step()."""
        for layer, k, row, column in self.on():
            row.copy_(layer.lora_A[k])  # (in,)
            column.copy_(layer.lora_B[:, k])  # (out,)
            row.grad = layer.lora_A.grad[k].clone()
            column.grad = layer.lora_B.grad[:, k].clone()
        for layer in self.layers.values():  # handed on: the optimizer's zero_grad is for the parts
            layer.lora_A.grad = layer.lora_B.grad = None

    @torch.no_grad()
    def after_step(self):
        """Call after optimizer.step()."""
        for layer, k, row, column in self.on():
            layer.lora_A[k] = row
            layer.lora_B[:, k] = column
