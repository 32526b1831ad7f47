"""Single ranks: the budget is spent on rank-one parts, so that every module gets its own rank.

HeteroLoRA (arXiv 2406.14956) switches whole modules of one rank. Here the unit of a decision is the
rank-one part B_k A_k: column k of lora_B with row k of lora_A. --per-rank yes.

    name   | symbol  | shape
    part   | B_k A_k | (out, in), of rank one; its cost is in + out parameters
    kept   | k       | list of the indices of the parts that a module keeps

    file            | what it does
    rank_scores.py  | a score for each part
    rank_budget.py  | the best parts that a budget buys
    here            | a decision: score, choose, switch or shrink
    rank_steps.py   | the optimizer's steps of the parts that are on

Static: once, before training; what is not kept is gone, and a module may keep nothing. Dynamic:
the factors keep their full shape, parts go off and return (ranks_off of a module), and every module
keeps one part at least. Off means to a part what it means to a module: no gradient, no step, no
decay, and its row, column and moments wait for its return.

What this file does not do: say when a decision is due (allocate.py, train.py).
"""

from torch import nn

import lora
from relatives.rank_budget import ranks_within_budget
from relatives.rank_scores import random_ranks, score_ranks
from support import distributed


def decide(model, plan, proxy, batches, step, epoch):
    """One decision about single ranks: score, choose, switch or shrink; put on record in the plan.

    Args:
        model: model.Transformer with adapters of one rank. With a static plan they shrink, so
            build the optimizer afterwards; with a dynamic one ranks go on and off.
        plan: allocate.Reallocator with a budget.
        proxy: one of rank_scores.CHOICES. batches: as in proxies.score.
        step, epoch: where the run stands.
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
            keep_ranks(layer, kept[name])


def keep_ranks(layer, kept):
    """Shrink a module to some of its parts; scaling stays: what is kept computes what it did.

    A and B become new, smaller parameters: build the optimizer afterwards.

    Args:
        layer: LoRALayer that trains A and B. kept: list of indices into 0 … r - 1, not empty.

    Raises:
        ValueError: kept is empty.
    """
    if not kept:
        raise ValueError("kept is empty: to drop every rank, set enabled = False")
    layer.lora_A = nn.Parameter(layer.lora_A.detach()[kept].clone())  # (r, in)
    layer.lora_B = nn.Parameter(layer.lora_B.detach()[:, kept].clone())  # (out, r)
    layer.r, layer.ranks_off = len(kept), []
    layer.lora_alpha = layer.scaling * layer.r


def shrink_to(model, parameters):
    """Shrink each module to the rank that its stored lora_A has, before a checkpoint is put back.

    Args:
        parameters: dict name -> tensor, as lora.trainable names them.
    """
    for name, layer in lora.adapters(model).items():
        stored = parameters.get(f"{name}.lora_A")
        if stored is not None and len(stored) < layer.r:
            keep_ranks(layer, list(range(len(stored))))
