"""A candidate for the oracle that shares no formula with the files that it judges.

Closed forms, dense matrices, brute force, AdamW written out, in place of lora.py, proxies.py,
allocate.py and delta_lora.py. The relatives' functions are in dense_relatives.py.

A transformer's forward pass is tests/dense.py (matrices, one example at a time); only the weights
are sorted into a model.Transformer by tools/oracle/ours.py, as a container. The small network's
gradients are backpropagation by hand.
"""

import itertools
import math

import torch

import dense
import lora
from dense_relatives import (  # noqa: F401  part of the candidate
    adalora,
    adalora_keep,
    adalora_penalty,
    adalora_schedule,
    adalora_scores,
    adamw_,
    alora_exchange,
    alora_importance,
    asymmetry,
    condlora,
    cora,
    dora,
    lora_pro,
    lora_rite,
    lora_xs,
    loraplus,
    prolora,
    reslora,
    riemannian,
    riemannian_step,
    sbora_fa,
    sbora_fb,
    tied,
    weight_change,
)
from tools.oracle import ours


def lora_forward(x, weight, bias, lora_A, lora_B, lora_alpha, transposed):
    """Row by row, entry by entry."""
    w = weight.T if transposed else weight
    r = lora_A.shape[0]
    rows = []
    for row in x:
        low = [sum(a * v for a, v in zip(lora_A[k], row, strict=True)) for k in range(r)]
        rows.append(
            torch.stack(
                [
                    sum(c * v for c, v in zip(w[o], row, strict=True))
                    + bias[o]
                    + lora_alpha / r * sum(lora_B[o, k] * low[k] for k in range(r))
                    for o in range(len(w))
                ]
            )
        )
    return torch.stack(rows)


def merge(weight, lora_A, lora_B, lora_alpha, transposed):
    delta = torch.einsum("or,ri->io" if transposed else "or,ri->oi", lora_B, lora_A)
    return weight + delta * lora_alpha / lora_A.shape[0]


def lora_backward(x, weight, bias, lora_A, lora_B, lora_alpha, transposed, grad):
    """Closed form: G = dL/dy^T x; dL/dA = s B^T G, dL/dB = s G A^T."""
    s, g = lora_alpha / lora_A.shape[0], torch.einsum("no,ni->oi", grad, x)
    effective = merge(weight.T if transposed else weight, lora_A, lora_B, lora_alpha, False)
    return {
        "x": torch.einsum("no,oi->ni", grad, effective),
        "lora_A": s * torch.einsum("or,oi->ri", lora_B, g),
        "lora_B": s * torch.einsum("oi,ri->or", g, lora_A),
    }


def logits(config, weights, adapters, batch):
    model, _ = ours.build(config, weights, adapters)
    with torch.no_grad():
        return dense.logits(model.double(), batch)


def gradients(config, weights, adapters, batches):
    """{full path: (A, dL/dA, B, dL/dB)} of the mean over all examples, through tests/dense.py."""
    model, paths = ours.build(config, weights, adapters)
    layers, terms = lora.adapters(model.double()), []
    for batch in batches:
        p = dense.logits(model, batch).log_softmax(-1)
        terms += [-p[i, label] for i, label in enumerate(batch["labels"])]
    flat = [p for layer in layers.values() for p in (layer.lora_A, layer.lora_B)]
    found = torch.autograd.grad(sum(terms) / len(terms), flat)
    a, b = [p.detach() for p in flat[::2]], [p.detach() for p in flat[1::2]]
    return dict(zip(paths.values(), zip(a, found[::2], b, found[1::2], strict=True), strict=True))


def scores(proxy, config, weights, adapters, batches):
    if proxy not in ("grad_norm", "snip"):
        raise NotImplementedError
    result = {}
    for path, (a, ga, b, gb) in gradients(config, weights, adapters, batches).items():
        if proxy == "grad_norm":
            result[path] = math.sqrt((ga**2).sum()) + math.sqrt((gb**2).sum())
        else:
            result[path] = ((a * ga).abs().sum() + (b * gb).abs().sum()).item()
    return result


def rank_scores(proxy, config, weights, adapters, batches):
    result = {}
    for path, (a, ga, b, gb) in gradients(config, weights, adapters, batches).items():
        if proxy == "snip":
            a_parts, b_parts = (a * ga).abs().sum(1), (b * gb).abs().sum(0)
        else:
            a_parts, b_parts = (ga**2).sum(1).sqrt(), (gb**2).sum(0).sqrt()
        result[path] = (a_parts + b_parts).tolist()
    return result


def keep_top(scores, keep, together):
    """The definition: no left-out name is better than a chosen one."""
    kinds = {n: n.split(".")[-1] in ("residual_1", "residual_2", "shortcut_sa") for n in scores}
    shortcuts = sum(kinds.values())
    counts = math.floor(keep * (len(scores) - shortcuts)), round(keep * shortcuts)
    if sum(counts) == 0:
        raise ValueError("nothing to keep")
    pools = [list(scores)] if together else [[n for n in scores if kinds[n] == k] for k in (0, 1)]
    wanted = [sum(counts)] if together else counts
    chosen = set()
    for pool, count in zip(pools, wanted, strict=True):
        for _ in range(count):
            chosen.add(max((n for n in pool if n not in chosen), key=scores.get))
    return chosen


def within_budget(scores, costs, budget):
    """Integer programming by counts: the k best of each size, all combinations of counts."""
    if min(costs.values()) > budget:
        raise ValueError("nothing fits")
    scores = {n: v for n, v in scores.items() if v > 0}
    sizes = sorted(set(costs.values()))
    groups = [sorted((n for n in scores if costs[n] == c), key=lambda n: -scores[n]) for c in sizes]
    best, best_value = (), -1.0
    for counts in itertools.product(*(range(len(g) + 1) for g in groups)):
        if sum(k * c for k, c in zip(counts, sizes, strict=True)) <= budget:
            chosen = [n for g, k in zip(groups, counts, strict=True) for n in g[:k]]
            value = sum(map(scores.get, chosen))
            if value > best_value:
                best, best_value = chosen, value
    return set(best)


def delta_lora(weight, lora_A, lora_B, lora_alpha, x, y, ratio, start, steps, adamw):
    """Algorithm 1, gradients in closed form."""
    s, w = lora_alpha / lora_A.shape[0], weight.clone()
    p = {"lora_A": lora_A.clone(), "lora_B": lora_B.clone()}
    states = {k: [0, torch.zeros_like(q), torch.zeros_like(q)] for k, q in p.items()}
    result = []
    for t in range(steps):
        error = x @ w.T + s * (x @ p["lora_A"].T) @ p["lora_B"].T - y
        g = torch.einsum("no,ni->oi", 2 * error / error.numel(), x)
        gradients = {"lora_A": s * p["lora_B"].T @ g, "lora_B": s * g @ p["lora_A"].T}
        before = p["lora_B"] @ p["lora_A"]
        p = {k: adamw_(p[k], gradients[k], states[k], **adamw) for k in p}
        if t > start:
            w = w + ratio * s * (p["lora_B"] @ p["lora_A"] - before)
        moments = {f"exp_avg_{k}": states[k][1] for k in p}
        moments |= {f"exp_avg_sq_{k}": states[k][2] for k in p}
        result.append({"weight": w, **p, **moments})
    return result


def delta_step(weight, old_A, old_B, new_A, new_B, lora_alpha, ratio):
    change = torch.einsum("or,ri->oi", new_B, new_A) - torch.einsum("or,ri->oi", old_B, old_A)
    return weight + ratio * lora_alpha / old_A.shape[0] * change


def delta_adapter(lora_A, lora_B, lora_alpha, ratio, start):
    """The sum over steps telescopes: the last pair is left, and the one W began to move at."""
    s, first = lora_alpha / lora_A.shape[1], start + 1
    factors = [s * (1 + ratio) * lora_B[-1], -s * ratio * lora_B[first]]
    return {"lora_A": torch.cat([lora_A[-1], lora_A[first]]), "lora_B": torch.cat(factors, 1)}


def backpropagated(layers, batches):
    """(L, [(A, dL/dA, B, dL/dB)]) of the mean over all examples: ∂L/∂z by hand, layer by layer."""
    x = torch.cat([batch["x"] for batch in batches])
    labels = torch.cat([batch["labels"] for batch in batches])
    n, inputs, result = len(x), [x], []
    scales = [layer["lora_alpha"] / layer["lora_A"].shape[0] for layer in layers]
    dense = [
        layer["weight"] + s * torch.einsum("or,ri->oi", layer["lora_B"], layer["lora_A"])
        for s, layer in zip(scales, layers, strict=True)
    ]
    for w in dense:
        z = inputs[-1] @ w.T
        inputs.append(z * (z > 0))
    p = z.exp() / z.exp().sum(1, keepdim=True)
    loss = -p[range(n), labels].log().mean().item()
    dz = p.clone()
    dz[range(n), labels] -= 1
    dz = dz / n
    for layer, w, s, h in zip(layers[::-1], dense[::-1], scales[::-1], inputs[-2::-1], strict=True):
        g, a, b = dz.T @ h, layer["lora_A"], layer["lora_B"]
        result.insert(0, (a, s * b.T @ g, b, s * g @ a.T))
        dz = dz @ w * (h > 0)
    return loss, result


def grad_norm(layers, batches):
    found = backpropagated(layers, batches)[1]
    return [math.sqrt((ga**2).sum()) + math.sqrt((gb**2).sum()) for _, ga, _, gb in found]


def snip(layers, batches):
    return [sum(parts) for parts in snip_ranks(layers, batches)]


def snip_ranks(layers, batches):
    return [
        [sum((a * ga).abs()[k]).item() + sum((b * gb).abs()[:, k]).item() for k in range(len(a))]
        for a, ga, b, gb in backpropagated(layers, batches)[1]
    ]


def synflow(layers):
    """2 s b^T |B| |A| f: f flows in from the ones below, b back from the ones above."""
    absolute = [{k: abs(v) for k, v in layer.items()} for layer in layers]
    scales = [layer["lora_alpha"] / layer["lora_A"].shape[0] for layer in layers]
    pairs = [s * x["lora_B"] @ x["lora_A"] for s, x in zip(scales, absolute, strict=True)]
    maps = [x["weight"] + pair for x, pair in zip(absolute, pairs, strict=True)]
    result = []
    for i, pair in enumerate(pairs):
        f = torch.ones_like(maps[0][0])
        for w in maps[:i]:
            f = w @ f
        b = torch.ones_like(maps[-1][:, 0])
        for w in maps[:i:-1]:
            b = b @ w
        result.append((2 * b @ pair @ f).item())
    return result


def short_run(layers, batches, settings):
    """Both methods; a layer that is off is one whose pair is left out."""
    layers, states = [dict(layer) for layer in layers], {}
    losses, decisions = [], []
    for t, batch in enumerate(batches):
        if t % settings["every"] == 0:
            values = grad_norm(layers, batches[: settings["score_batches"]])
            count = math.floor(settings["keep"] * len(layers))
            decisions.append(sorted(sorted(range(len(layers)), key=lambda i: -values[i])[:count]))
        on = decisions[-1]
        shown = [
            layer if i in on else {**layer, "lora_B": 0 * layer["lora_B"]}
            for i, layer in enumerate(layers)
        ]
        loss, found = backpropagated(shown, [batch])
        losses.append(loss)
        for i in on:
            layer, (_, ga, _, gb) = layers[i], found[i]
            before = layer["lora_B"] @ layer["lora_A"]
            for k, g in (("lora_A", ga), ("lora_B", gb)):
                state = states.setdefault((i, k), [0, 0 * g, 0 * g])
                layer[k] = adamw_(layer[k], g, state, **settings["adamw"])
            if t > settings["delta_start"]:
                s = layer["lora_alpha"] / layer["lora_A"].shape[0]
                change = layer["lora_B"] @ layer["lora_A"] - before
                layer["weight"] = layer["weight"] + settings["delta_ratio"] * s * change
    pairs = [{k: layer[k] for k in ("lora_A", "lora_B")} for layer in layers]
    weights = [layer["weight"] for layer in layers]
    return {"losses": losses, "on": decisions, "adapters": pairs, "weights": weights}
