"""ALoRA's decision: what each rank is worth, and who gives ranks to whom (arXiv 2403.16187).

    IS(k) = S(M) - S(M without k) + S(M with k alone),      S = -loss

    name    | symbol  | meaning
    closed  | a = 0   | dict module -> the ranks whose gates are closed before the decision
    whole   | -S(M)   | the loss with all ranks that are on
    without |         | the loss without rank k as well
    alone   |         | the loss with rank k alone

What this file does not do: prune or grow (alora.py).
"""

import torch

import lora
import proxies
from support import distributed


@torch.no_grad()
def mean_loss(model, batches):
    """Of all examples (or predicted tokens) in a list of batches, a float."""
    terms = [proxies.loss_terms(model, batch) for batch in batches]
    losses = [model(**batch).loss.item() for batch in batches]
    return sum(n * loss for n, loss in zip(terms, losses, strict=True)) / sum(terms)


def importance(model, batches):
    """The importance of every rank that is on; all gates are left as they were, in any case.

    Args:
        model: model.Transformer with adapters, ranks_off of each set. batches: list of batches.

    Returns:
        dict (module, k) -> IS(k), the same on every process.
    """
    layers, batches, training = lora.adapters(model), list(batches), model.training
    closed = {name: layer.ranks_off for name, layer in layers.items()}
    ranks = [(n, k) for n, a in layers.items() for k in range(a.r) if k not in closed[n]]
    model.eval()
    try:
        whole, found = mean_loss(model, batches), {}
        for name, k in ranks:
            layer = layers[name]
            layer.ranks_off = [*closed[name], k]
            without = mean_loss(model, batches)
            for other in layers.values():
                other.ranks_off = list(range(other.r))
            layer.ranks_off = [j for j in range(layer.r) if j != k]
            alone = mean_loss(model, batches)
            # IS(k) = S(M) - S(M without k) + S(M with k alone),  S = -loss
            found[name, k] = -whole + without - alone
            for n, off in closed.items():
                layers[n].ranks_off = off
    finally:
        for n, off in closed.items():
            layers[n].ranks_off = off
        model.train(training)
    return distributed.mean_scores(found)


def exchange(scores, places, on):
    """The rule of one round.

    Of ranks that are equally important the first one goes, and of modules the first by name gets.
    deviates: a module that holds no rank counts 0, because the paper says nothing of it. As -loss
    of one rank alone makes IS negative, it is the first to get one.

    Args:
        scores: dict (module, k) -> IS(k), of every rank that is on.
        places: dict module -> how many ranks it can hold. on: dict module -> how many it holds.

    Returns:
        (pruned, grown): list of (module, k), and dict module -> how many new ranks; as many.
    """
    worst = sorted(scores, key=scores.get)[: len(places)]
    losers = {name for name, _ in worst}
    means = {}
    for name in places.keys() - losers:
        own = [value for (module, _), value in scores.items() if module == name]
        means[name] = sum(own) / len(own) if own else 0.0
    winners = sorted(sorted(means), key=means.get, reverse=True)
    grown, left = dict.fromkeys(winners, 0), len(worst)
    while left and any(on[n] + grown[n] < places[n] for n in winners):
        for name in winners:
            if left and on[name] + grown[name] < places[name]:
                grown[name] += 1
                left -= 1
    return worst[: len(worst) - left], grown
