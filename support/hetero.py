"""HeteroLoRA in a run (arXiv 2406.14956): between the scores, the plan and the modules.

    proxies.py (tensors -> scores)  ->  allocate.py (scores -> names)  ->  here: names -> on or off

What this file does not do: decide when (allocate.Reallocator.due), train, or write files (train.py
does).
"""

import time
import warnings

import allocate
import lora
import proxies
from support import distributed, seeds


def make_plan(model, args):
    """The schedule of allocations, or None; refuses a budget that no allocation can meet."""
    if args.allocate == "none":
        return None
    if args.proxy.startswith("alpha_test") and model.config.num_labels == 1:
        raise ValueError(f"--proxy {args.proxy} needs accuracy, and task {args.task} has scores")
    layers = lora.adapters(model)
    costs = {name: a.r * (a.in_features + a.out_features) for name, a in layers.items()}
    if args.budget_params is not None:
        smallest = costs if args.per_rank == "no" else {n: c // args.r for n, c in costs.items()}
        allocate.check_budget(args.budget_params, smallest)
    else:
        allocate.keep_top(costs, args.keep)
    return allocate.Reallocator(
        costs,
        args.allocate,
        args.keep,
        args.budget_params,
        args.every,
        args.rank == "together",
        seeds.generator(args.seed, "allocation"),
    )


def reallocate(model, plan, args, batches, step, epoch, say):
    """Score, choose, switch. Before a step, never inside one: no half-accumulated gradient is
    around.

    Args:
        model: model.Transformer with adapters; modules are switched, and shrunk where ranks are
            allocated.
        plan: allocate.Reallocator, which records the decision.
        args: the flags.
        batches: list of batches to score.
        step, epoch: where the run stands.
        say: called with lines for the person at the terminal.

    Returns:
        seconds that it took.
    """
    started, layers = time.monotonic(), lora.adapters(model)
    rank_costs = {name: cost // args.r for name, cost in plan.costs.items()}
    if args.proxy == "uniform":
        kept = allocate.uniform_ranks(rank_costs, args.r, args.budget_params)
        shrink(layers, kept)
        plan.record(step, epoch, dict.fromkeys(kept, 1.0), kept)
    elif args.per_rank == "yes":
        scores = distributed.mean_scores(proxies.score_ranks(args.proxy, model, batches))
        kept = allocate.ranks_within_budget(scores, rank_costs, args.budget_params, plan.generator)
        shrink(layers, kept)
        plan.record(step, epoch, scores, kept)
    else:
        on = plan.decide(scores_of(model, plan, args, batches, say), step, epoch)
        for name, layer in layers.items():
            layer.enabled = name in on
    say(f"step {step}: {args.proxy} chose")
    levels = {name: layer.r / args.r * layer.enabled for name, layer in layers.items()}
    say(allocate.grid(levels, plan.costs, args.budget_params))
    return time.monotonic() - started


def scores_of(model, plan, args, batches, say):
    """The scores of a proxy, or of a baseline; what the proxy warns of is said."""
    if args.proxy in allocate.BASELINES:
        return allocate.baseline_scores(args.proxy, plan.costs, plan.generator)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores = proxies.score(args.proxy, model, batches)
    for warning in caught:
        say(f"note: {warning.message}")
    return distributed.mean_scores(scores)


def shrink(layers, kept):
    """Leave each module the ranks that are kept; the optimizer is built afterwards."""
    for name, layer in layers.items():
        layer.enabled = bool(kept[name])
        if kept[name] and len(kept[name]) < layer.r:
            layer.keep_ranks(kept[name])
