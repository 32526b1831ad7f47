"""Wrong variants of every function of the oracle, so that a failure can be told its likely cause.

Each function takes a case's arguments and yields (cause, what a candidate with that mistake
returns). oracle.py compares a wrong output with each of them.

What this file does not do: compute the right answer (oracle_ours.py).
"""

import math

import torch

import allocate
import lora
import proxies
from tools.oracle import ours


def scales(lora_alpha, r):
    """(cause, wrong scaling)."""
    yield "scale lora_alpha instead of lora_alpha / r", lora_alpha
    yield "scale lora_alpha / sqrt(r), as rsLoRA", lora_alpha / math.sqrt(r)
    yield "no scale", 1.0
    yield "scale applied twice", (lora_alpha / r) ** 2
    yield "the low-rank branch is missing", 0.0


# ----------------------------------------------------------------------------------- one LoRA layer


def lora_forward(x, weight, bias, lora_A, lora_B, lora_alpha, transposed):
    def y(w, s, bias=bias, delta=lora_B @ lora_A):
        return x @ (w + s * delta).T + bias

    w, r = weight.T if transposed else weight, len(lora_A)
    for cause, s in scales(lora_alpha, r):
        yield cause, y(w, s)
    yield "the bias is missing", y(w, lora_alpha / r, 0 * bias)
    yield "the frozen layer is missing", y(0 * w, lora_alpha / r, 0 * bias)
    if w.shape[0] == w.shape[1]:
        yield (
            "A and B exchanged (delta W transposed)",
            y(w, lora_alpha / r, delta=(lora_B @ lora_A).T),
        )
        yield "the weight taken for its transpose", y(w.T, lora_alpha / r)


def lora_backward(x, weight, bias, lora_A, lora_B, lora_alpha, transposed, grad):
    def gradients(s, n=1):
        g = grad.T @ x  # dL/dW, (out, in)
        dense = w + s * lora_B @ lora_A
        return {"x": grad @ dense, "lora_A": s * lora_B.T @ g / n, "lora_B": s * g @ lora_A.T / n}

    w, r = weight.T if transposed else weight, len(lora_A)
    for cause, s in scales(lora_alpha, r):
        yield cause, gradients(s)
    yield "gradients divided by the number of rows", gradients(lora_alpha / r, len(x))
    yield "dL/dx without the low-rank branch", {**gradients(lora_alpha / r), "x": grad @ w}


def merge(weight, lora_A, lora_B, lora_alpha, transposed):
    def stored(delta):
        return weight + (delta.T if transposed else delta)

    delta, r = lora_B @ lora_A, len(lora_A)
    for cause, s in scales(lora_alpha, r):
        yield cause, stored(s * delta)
    yield "subtracted instead of added", stored(-lora_alpha / r * delta)
    if delta.shape[0] == delta.shape[1]:
        yield "A and B exchanged (delta W transposed)", stored(lora_alpha / r * delta.T)


# ------------------------------------------------------------------------------ a small transformer


def rescaled(adapters):
    """(cause, the adapters with an alpha that makes the mistake of scales())."""
    for cause, _ in scales(1, 1):
        wrong = {}
        for path, a in adapters.items():
            r = len(a["lora_A"])
            wrong[path] = {**a, "lora_alpha": dict(scales(a["lora_alpha"], r))[cause] * r}
        yield cause, wrong


def logits(config, weights, adapters, batch):
    for cause, wrong in rescaled(adapters):
        yield cause, ours.logits(config, weights, wrong, batch)
    for place in ("residual_1", "residual_2", "shortcut_sa", "shortcut_ffn"):
        fewer = {path: a for path, a in adapters.items() if not path.endswith(place)}
        if len(fewer) < len(adapters):
            yield f"{place} is missing", ours.logits(config, weights, fewer, batch)
    blind = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
    yield "padding is attended to", ours.logits(config, weights, adapters, blind)


def combined(proxy, layer, a, b):
    """(cause, score) from the right gradients."""
    if proxy == "grad_norm":
        yield "the norm of both factors together", (a.norm() ** 2 + b.norm() ** 2).sqrt().item()
        yield "squared norms", (a.norm() ** 2 + b.norm() ** 2).item()
        yield "lora_A alone", a.norm().item()
        yield "lora_B alone", b.norm().item()
        yield "L1 norms", (a.abs().sum() + b.abs().sum()).item()
    else:
        in_a, in_b = (layer.lora_A * a).detach(), (layer.lora_B * b).detach()
        yield "absolute value of the sum", (in_a.sum().abs() + in_b.sum().abs()).item()
        yield "no absolute value", (in_a.sum() + in_b.sum()).item()
        yield "lora_A alone", in_a.abs().sum().item()
        yield "lora_B alone", in_b.abs().sum().item()


def gradients_of(model, batches):
    """{name: (dL/dA, dL/dB)}."""
    found = proxies.factor_gradients(model, batches)
    return {name: tuple(gradient for _, gradient in pairs) for name, pairs in found.items()}


def scores(proxy, config, weights, adapters, batches):
    for cause, wrong in rescaled(adapters) if not proxy.startswith("alpha") else ():
        yield cause, ours.scores(proxy, config, weights, wrong, batches)
    model, paths = ours.build(config, weights, adapters)
    if proxy in ("grad_norm", "snip"):
        layers = lora.adapters(model)
        parts = [gradients_of(model, [batch]) for batch in batches]
        summed = {n: [sum(p[n][i] for p in parts) for i in (0, 1)] for n in layers}
        right = gradients_of(model, batches)
        for cause, gradients in (
            ("gradients summed over batches instead of the mean", summed),
            ("mean of the batches' means, whatever their size", halved(summed, len(batches))),
        ):
            yield cause, {paths[n]: plain(proxy, layers[n], *g) for n, g in gradients.items()}
        names = [cause for cause, _ in combined(proxy, *next(iter_layers(layers, right)))]
        for i, cause in enumerate(names):
            values = [list(combined(proxy, *x))[i][1] for x in iter_layers(layers, right)]
            yield cause, dict(zip(paths.values(), values, strict=True))
    found = ours.scores(proxy, config, weights, adapters, batches)
    others = {"grasp": [("the other sign", -1.0)], "fisher": [("without the 1/2", 2.0)]}
    count = sum(len(b["labels"]) for b in batches)
    others["fisher"] += [("sum over examples instead of the mean", count)]
    others["alpha_test"] = [("a from 0 to 1 instead of 0 to 10", 0.1)]
    for cause, factor in others.get(proxy, []):
        yield cause, {path: factor * value for path, value in found.items()}
    related = {"synflow": "synflow_released", "alpha_test": "alpha_test_released"}
    related |= {b: a for a, b in related.items()}
    if proxy in related:
        wrong = ours.scores(related[proxy], config, weights, adapters, batches)
        yield f"this is {related[proxy]}", wrong


def iter_layers(layers, gradients):
    return ((layers[n], *gradients[n]) for n in layers)


def halved(gradients, n):
    return {name: [g / n for g in pair] for name, pair in gradients.items()}


def plain(proxy, layer, a, b):
    if proxy == "grad_norm":
        return (a.norm() + b.norm()).item()
    return ((layer.lora_A * a).abs().sum() + (layer.lora_B * b).abs().sum()).item()


def rank_scores(proxy, config, weights, adapters, batches):
    for cause, wrong in rescaled(adapters):
        yield cause, ours.rank_scores(proxy, config, weights, wrong, batches)
    found = ours.rank_scores(proxy, config, weights, adapters, batches)
    yield "ranks in reverse order", {path: values[::-1] for path, values in found.items()}
    whole = ours.scores(proxy, config, weights, adapters, batches)
    yield (
        "every rank has the module's score",
        {p: [whole[p]] * len(values) for p, values in found.items()},
    )


# --------------------------------------------------------------------------------------- allocation


def keep_top(scores, keep, together):
    ranked = sorted(scores, key=scores.get, reverse=True)
    n_s = sum(allocate.is_shortcut(n) for n in scores)
    n_l = len(scores) - n_s
    right = math.floor(keep * n_l) + round(keep * n_s)
    if not right:
        return
    kind = "ranked apart" if together else "ranked together"
    yield kind, allocate.keep_top(scores, keep, not together)
    yield "the worst are kept", set(ranked[::-1][:right])
    yield "round for both counts", set(ranked[: round(keep * n_l) + round(keep * n_s)])
    yield "floor for both counts", set(ranked[: math.floor(keep * n_l) + math.floor(keep * n_s)])


def within_budget(scores, costs, budget):
    orders = {
        "greedy by score": lambda n: -scores[n],
        "greedy by score per parameter": lambda n: -scores[n] / costs[n],
        "greedy by size": lambda n: costs[n],
    }
    for cause, key in orders.items():
        chosen, left = set(), budget
        for name in sorted(scores, key=key):
            if costs[name] <= left:
                chosen.add(name)
                left -= costs[name]
        yield cause, chosen
    if min(costs.values()) < budget:
        yield (
            "a budget that is met exactly is refused",
            allocate.within_budget(scores, costs, budget - 1),
        )


# ----------------------------------------------------------------------------------------- training

DELTA_MISTAKES = {  # cause: the change of W, from A, B before and A', B' after the step, and s
    "lambda without the scale": lambda a, b, new_a, new_b, s: new_b @ new_a - b @ a,
    "second order: (B' - B)(A' - A)": lambda a, b, new_a, new_b, s: s * (new_b - b) @ (new_a - a),
    "the whole new product instead of the difference": lambda a, b, new_a, new_b, s: (
        s * new_b @ new_a
    ),
    "old minus new": lambda a, b, new_a, new_b, s: s * (b @ a - new_b @ new_a),
    "new plus old": lambda a, b, new_a, new_b, s: s * (b @ a + new_b @ new_a),
    "W does not move": lambda a, b, new_a, new_b, s: torch.zeros_like(b @ a),
}


def delta_steps(arguments, change, shift=0, alpha_for_scale=False):
    """Algorithm 1 with a change of W of one's own, and t > K + shift."""
    g = arguments
    s = g["lora_alpha"] if alpha_for_scale else g["lora_alpha"] / len(g["lora_A"])
    w, result = g["weight"].clone(), []
    a, b = (torch.nn.Parameter(g[n].clone()) for n in ("lora_A", "lora_B"))
    optimizer = torch.optim.AdamW([a, b], **g["adamw"])
    for t in range(g["steps"]):
        optimizer.zero_grad()
        (g["x"] @ (w + s * b @ a).T - g["y"]).square().mean().backward()
        old_a, old_b = a.detach().clone(), b.detach().clone()
        optimizer.step()
        if t > g["start"] + shift:
            w = w + g["ratio"] * change(old_a, old_b, a.detach(), b.detach(), s)
        state = {"weight": w, "lora_A": a, "lora_B": b}
        for name, p in (("lora_A", a), ("lora_B", b)):
            for moment in ("exp_avg", "exp_avg_sq"):
                state[f"{moment}_{name}"] = optimizer.state[p][moment]
        result.append({k: v.detach().clone() for k, v in state.items()})
    return result


def delta_lora(**arguments):
    def right(a, b, new_a, new_b, s):
        return s * (new_b @ new_a - b @ a)

    for cause, change in DELTA_MISTAKES.items():
        yield cause, delta_steps(arguments, change)
    yield "W moves one step early (t >= K)", delta_steps(arguments, right, -1)
    yield "W moves one step late", delta_steps(arguments, right, 1)
    yield (
        "scale lora_alpha instead of lora_alpha / r",
        delta_steps(arguments, right, alpha_for_scale=True),
    )


def train(config, weights, adapters, batches, settings):
    changes = {
        "decided once, not every few steps": {"every": len(batches) + 1},
        "W does not move": {"delta_ratio": 0.0, "delta_start": len(batches)},
        "W moves from the first step": {"delta_start": -1},
        "everything is on": {"keep": 1.0},
        "scored on one batch": {"score_batches": 1},
        "no weight decay": {"adamw": {**settings["adamw"], "weight_decay": 0.0}},
    }
    for cause, change in changes.items():
        yield cause, ours.train(config, weights, adapters, batches, {**settings, **change})
    for cause, wrong in rescaled(adapters):
        yield cause, ours.train(config, weights, wrong, batches, settings)
