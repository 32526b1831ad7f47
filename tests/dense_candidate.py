"""A candidate for the oracle that shares no formula with the files that it judges.

Closed forms, dense matrices, brute force, AdamW written out, in place of lora.py, proxies.py,
allocate.py and delta_lora.py.

The forward pass is tests/dense.py (matrices, one example at a time); only the weights are sorted
into a model.Transformer by tools/oracle_ours.py, as a container.
"""

import itertools
import math

import torch

import dense
import lora
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
    sizes = sorted(set(costs.values()))
    groups = [sorted((n for n in scores if costs[n] == c), key=lambda n: -scores[n]) for c in sizes]
    best, best_value = (), -1.0
    for counts in itertools.product(*(range(len(g) + 1) for g in groups)):
        if sum(k * c for k, c in zip(counts, sizes, strict=True)) <= budget:
            chosen = [n for g, k in zip(groups, counts, strict=True) for n in g[:k]]
            value = sum(scores[n] for n in chosen)
            if value > best_value:
                best, best_value = chosen, value
    return set(best)


def delta_lora(weight, lora_A, lora_B, lora_alpha, x, y, ratio, start, steps, adamw):
    """Algorithm 1 and AdamW (arXiv 1711.05101, Algorithm 2) written out."""
    s, (b1, b2) = lora_alpha / lora_A.shape[0], adamw["betas"]
    w, p = weight.clone(), {"lora_A": lora_A.clone(), "lora_B": lora_B.clone()}
    m, v = ({k: torch.zeros_like(q) for k, q in p.items()} for _ in range(2))
    result = []
    for t in range(steps):
        error = x @ w.T + s * (x @ p["lora_A"].T) @ p["lora_B"].T - y
        g = torch.einsum("no,ni->oi", 2 * error / error.numel(), x)
        gradients = {"lora_A": s * p["lora_B"].T @ g, "lora_B": s * g @ p["lora_A"].T}
        before = p["lora_B"] @ p["lora_A"]
        for k in p:
            m[k] = b1 * m[k] + (1 - b1) * gradients[k]
            v[k] = b2 * v[k] + (1 - b2) * gradients[k] ** 2
            step = m[k] / (1 - b1 ** (t + 1)) / ((v[k] / (1 - b2 ** (t + 1))).sqrt() + adamw["eps"])
            p[k] = p[k] - adamw["lr"] * adamw["weight_decay"] * p[k] - adamw["lr"] * step
        if t > start:
            w = w + ratio * s * (p["lora_B"] @ p["lora_A"] - before)
        moments = {f"exp_avg_{k}": m[k] for k in p} | {f"exp_avg_sq_{k}": v[k] for k in p}
        result.append({"weight": w, **p, **moments})
    return result
