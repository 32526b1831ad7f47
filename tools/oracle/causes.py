"""What people get wrong: wrong variants of every function of the oracle, each with its name.

A function here has the name and the arguments of one of ours.py, and yields (cause, wrong): wrong()
is what a candidate with that mistake, and no other, returns or raises. check.py compares a
candidate's wrong answer with each of them.

What this file does not do: compute the right answer (ours.py), or judge (check.py).
"""

import functools
import math

import torch

import allocate
import lora
from tools.oracle import ours


def scales(lora_alpha, r):
    """{cause: wrong scaling}."""
    return {
        "scale lora_alpha instead of lora_alpha / r": lora_alpha,
        "scale lora_alpha / sqrt(r), as rsLoRA": lora_alpha / math.sqrt(r),
        "scale lora_alpha // r, rounded down": lora_alpha // r,
        "scale r / lora_alpha": r / lora_alpha,
        "no scale": 1.0,
        "scale applied twice": (lora_alpha / r) ** 2,
        "the low-rank branch is missing": 0.0,
    }


def call(function, *args, **kwargs):
    """functools.partial by a shorter name: the mistake is made only if somebody asks."""
    return functools.partial(function, *args, **kwargs)


# ----------------------------------------------------------------------------------- one LoRA layer


def lora_forward(x, weight, bias, lora_A, lora_B, lora_alpha, transposed):
    def y(w, s, bias=bias, delta=lora_B @ lora_A):
        return x @ (w + s * delta).T + bias

    w, s = weight.T if transposed else weight, lora_alpha / len(lora_A)
    for cause, wrong in scales(lora_alpha, len(lora_A)).items():
        yield cause, call(y, w, wrong)
    yield "the bias is missing", call(y, w, s, 0 * bias)
    yield "the frozen layer is missing", call(y, 0 * w, s, 0 * bias)
    yield "the scale is on the frozen layer too", lambda: s * y(w, 1.0)
    if len(lora_B) == lora_A.shape[1]:
        exchanged = "A and B exchanged (delta W transposed)"
        yield exchanged, call(y, w, s, delta=(lora_B @ lora_A).T)
    yield "the weight taken for its transpose", call(y, w.T, s)


def lora_backward(x, weight, bias, lora_A, lora_B, lora_alpha, transposed, grad):
    def gradients(w, s, s_a=None, s_b=None, n=1):
        g = grad.T @ x  # dL/dW, (out, in)
        return {
            "x": grad @ (w + s * lora_B @ lora_A),
            "lora_A": (s if s_a is None else s_a) * lora_B.T @ g / n,
            "lora_B": (s if s_b is None else s_b) * g @ lora_A.T / n,
        }

    w, s = weight.T if transposed else weight, lora_alpha / len(lora_A)
    for cause, wrong in scales(lora_alpha, len(lora_A)).items():
        yield cause, call(gradients, w, wrong)
    yield "no scale in dL/dA", call(gradients, w, s, s_a=1)
    yield "no scale in dL/dB", call(gradients, w, s, s_b=1)
    yield "no scale in dL/dA and dL/dB", call(gradients, w, s, s_a=1, s_b=1)
    yield "gradients divided by the number of rows", call(gradients, w, s, n=len(x))
    yield "dL/dx without the low-rank branch", lambda: {**gradients(w, s), "x": grad @ w}
    yield "dL/dx without the frozen layer", call(gradients, 0 * w, s)
    yield "the weight taken for its transpose", call(gradients, w.T, s)


def merge(weight, lora_A, lora_B, lora_alpha, transposed):
    delta, s = lora_B @ lora_A, lora_alpha / len(lora_A)
    right = delta.T if transposed else delta
    for cause, wrong in scales(lora_alpha, len(lora_A)).items():
        yield cause, call(torch.add, weight, wrong * right)
    yield "subtracted instead of added", call(torch.sub, weight, s * right)
    yield "delta W alone, without W", lambda: s * right
    if transposed:
        yield "delta W is not transposed, but W is (in, out)", lambda: weight + s * delta
        yield "the merged weight is (out, in), but W came as (in, out)", lambda: weight.T + s * delta
    elif len(lora_B) == lora_A.shape[1]:
        yield "A and B exchanged (delta W transposed)", lambda: weight + s * delta.T


# --------------------------------------------------------------------------------------- allocation


def keep_top(scores, keep, together):
    kinds = [[n for n in scores if allocate.is_shortcut(n) == kind] for kind in (False, True)]
    n_l, n_s = map(len, kinds)
    size = {name: abs(value) for name, value in scores.items()}

    def best(by, modules, shortcuts, together=together):
        ranked = [sorted(names, key=lambda n: -by[n]) for names in ([*scores], *kinds)]
        if together:
            return set(ranked[0][: modules + shortcuts])
        return {*ranked[1][:modules], *ranked[2][:shortcuts]}

    def at_cut(by_cut):
        pools = [[*scores]] if together else kinds
        counts = [right[0] + right[1]] if together else right
        chosen = set()
        for names, count in zip(pools, counts, strict=True):
            cut = sorted((scores[n] for n in names), reverse=True)[count - 1]
            chosen |= {n for n in names if by_cut(scores[n], cut)}
        return chosen

    right = math.floor(keep * n_l), round(keep * n_s)
    if 0 in right:
        return
    opposite = "ranked apart, not together" if together else "ranked together, not apart"
    yield opposite, call(best, scores, *right, not together)
    yield "the worst are kept", call(best, {n: -v for n, v in scores.items()}, *right)
    yield "chosen by |score|", call(best, size, *right)
    yield "all at the cut are kept (>= cut)", call(at_cut, float.__ge__)
    yield "none at the cut is kept (> cut)", call(at_cut, float.__gt__)
    counts = {
        "round for both counts": (round(keep * n_l), round(keep * n_s)),
        "floor for both counts": (math.floor(keep * n_l), math.floor(keep * n_s)),
        "ceil for both counts": (math.ceil(keep * n_l), math.ceil(keep * n_s)),
        "round for the modules, floor for the shortcuts": (
            round(keep * n_l),
            math.floor(keep * n_s),
        ),
        "halves rounded up": (math.floor(keep * n_l), math.floor(keep * n_s + 0.5)),
    }
    if together:
        for rounded in (math.floor, round, math.ceil):
            text = f"{rounded.__name__} of keep times all, modules and shortcuts in one"
            counts[text] = (rounded(keep * (n_l + n_s)), 0)
    for cause, wrong in counts.items():
        yield cause, call(best, scores, *wrong)


def within_budget(scores, costs, budget):
    def greedy(key, stop=False, over=False):
        chosen, left = set(), budget
        for name in sorted(scores, key=key):
            if costs[name] > left and (stop or over):
                return chosen | {name} if over else chosen
            if costs[name] <= left:
                chosen.add(name)
                left -= costs[name]
        return chosen

    if min(costs.values()) > budget:
        return
    orders = {
        "greedy by score": lambda n: -scores[n],
        "greedy by score per parameter": lambda n: -scores[n] / costs[n],
    }
    yield "greedy by size", call(greedy, lambda n: costs[n])
    for cause, key in orders.items():
        yield cause, call(greedy, key)
        yield f"{cause}, ended by the first that does not fit", call(greedy, key, stop=True)
        yield f"{cause}, and the first that does not fit is taken too", call(greedy, key, over=True)
    exact = allocate.within_budget
    if min(costs.values()) < budget:
        yield "a budget that is met exactly is refused", call(exact, scores, costs, budget - 1)
    size = {name: abs(value) for name, value in scores.items()}
    yield "chosen by |score|", call(exact, size, costs, budget)
    per = {name: value / costs[name] for name, value in scores.items()}
    yield "the sum of score per parameter is the largest", call(exact, per, costs, budget)
    alike = dict.fromkeys(scores, 1.0)
    yield "the number of modules is the largest", call(exact, alike, costs, budget)


# --------------------------------------------------------------------- scores, of any kind of model

RULES = {  # pair A, B with gradients a, b -> score
    "grad_norm": lambda A, a, B, b: a.norm() + b.norm(),
    "snip": lambda A, a, B, b: (A * a).abs().sum() + (B * b).abs().sum(),
}
WRONG_RULES = {
    "grad_norm": {
        "the norm of both factors together": lambda A, a, B, b: (a.norm() ** 2 + b.norm() ** 2) ** 0.5,
        "squared norms": lambda A, a, B, b: a.norm() ** 2 + b.norm() ** 2,
        "lora_A alone": lambda A, a, B, b: a.norm(),
        "lora_B alone": lambda A, a, B, b: b.norm(),
        "L1 norms": lambda A, a, B, b: a.abs().sum() + b.abs().sum(),
        "divided by the number of parameters": lambda A, a, B, b: (
            (a.norm() + b.norm()) / (a.numel() + b.numel())
        ),
        "root mean square in place of the norm": lambda A, a, B, b: (
            a.square().mean() ** 0.5 + b.square().mean() ** 0.5
        ),
        "this is snip": RULES["snip"],
    },
    "snip": {
        "absolute value of the sum": lambda A, a, B, b: (A * a).sum().abs() + (B * b).sum().abs(),
        "no absolute value": lambda A, a, B, b: (A * a).sum() + (B * b).sum(),
        "squared: sum of (theta g)^2": lambda A, a, B, b: (
            (A * a).square().sum() + (B * b).square().sum()
        ),
        "lora_A alone": lambda A, a, B, b: (A * a).abs().sum(),
        "lora_B alone": lambda A, a, B, b: (B * b).abs().sum(),
        "divided by the number of parameters": lambda A, a, B, b: (
            ((A * a).abs().sum() + (B * b).abs().sum()) / (a.numel() + b.numel())
        ),
        "the gradient alone, without the weight": lambda A, a, B, b: a.abs().sum() + b.abs().sum(),
        "this is grad_norm": RULES["grad_norm"],
    },
}
DIVIDED = "divided by the sum over all modules"


def by_rank(rule):
    """A rule for a pair -> the same for each of its rank-one parts: row k of A, column k of B."""

    def parts(A, a, B, b):
        return torch.stack(
            [rule(A[k], a[k], B[:, k], b[:, k]) for k in range(len(A))]  # (r,)
        )

    return parts


def gradients(model, batch):
    """{name: (dL/dA, dL/dB)} of one batch, all modules as they are."""
    layers = lora.adapters(model)
    pairs = [p for layer in layers.values() for p in (layer.lora_A, layer.lora_B)]
    found = torch.autograd.grad(model(**batch).loss, pairs)
    return dict(zip(layers, zip(found[::2], found[1::2], strict=True), strict=True))


def singles(batches):
    """Every example a batch of its own."""
    return [
        {key: value[i : i + 1] for key, value in batch.items()}
        for batch in batches
        for i in range(len(batch["labels"]))
    ]


def combined(parts, shares):
    """Sum of gradients, each times its share."""
    return {
        name: tuple(sum(s * part[name][i] for s, part in zip(shares, parts, strict=True)) for i in (0, 1))
        for name in parts[0]
    }


def scored(rule, model, found):
    """{name: score} from gradients; a number, or for ranks a list."""
    pairs = {n: (layer.lora_A.detach(), layer.lora_B.detach()) for n, layer in lora.adapters(model).items()}
    return {n: rule(pairs[n][0], a, pairs[n][1], b).tolist() for n, (a, b) in found.items()}


def score_mistakes(proxy, model, batches, ranks=False):
    """Wrong scores {name: score} by grad_norm or snip, of any model with adapters."""
    as_is = by_rank if ranks else lambda rule: rule
    rule = as_is(RULES[proxy])
    sizes = [len(batch["labels"]) for batch in batches]
    parts = [gradients(model, batch) for batch in batches]
    n = len(batches)
    wrong_means = {
        "gradients summed over batches instead of the mean": [1.0] * n,
        "mean of the batches' means, whatever their size": [1 / n] * n,
        "gradients summed over examples instead of the mean": [float(size) for size in sizes],
        "the last batch alone": [0.0] * (n - 1) + [1.0],
        "the first batch alone": [1.0] + [0.0] * (n - 1),
    }
    for cause, shares in wrong_means.items():
        yield cause, call(scored, rule, model, combined(parts, shares))

    def averaged(pieces):
        found = [scored(rule, model, gradients(model, piece)) for piece in pieces]
        return {n: torch.tensor([f[n] for f in found]).double().mean(0).tolist() for n in found[0]}

    yield "scored batch by batch, then averaged", call(averaged, batches)
    yield "scored example by example, then averaged", lambda: averaged(singles(batches))
    right = combined(parts, [size / sum(sizes) for size in sizes])
    for cause, wrong in WRONG_RULES[proxy].items():
        yield cause, call(scored, as_is(wrong), model, right)
    values = scored(rule, model, right)
    if ranks:
        yield "ranks in reverse order", lambda: {name: v[::-1] for name, v in values.items()}
        whole = scored(RULES[proxy], model, right)
        every = {name: [whole[name]] * len(v) for name, v in values.items()}
        yield "every rank has the module's score", lambda: every
        return
    total = sum(values.values()) or 1.0
    yield DIVIDED, lambda: {name: v / total for name, v in values.items()}


# ---------------------------------------------------------------------------------- a small network


def rescaled_layers(layers):
    """(cause, the layers with an alpha that makes the mistake of scales())."""
    for cause in scales(1, 1):
        wrong = []
        for layer in layers:
            r = len(layer["lora_A"])
            wrong.append({**layer, "lora_alpha": scales(layer["lora_alpha"], r)[cause] * r})
        yield cause, wrong


def network_scores(name, proxy, layers, batches, ranks=False):
    for cause, wrong in rescaled_layers(layers):
        yield cause, call(getattr(ours, name), wrong, batches)
    for cause, wrong in score_mistakes(proxy, ours.Network(layers), batches, ranks):
        yield cause, lambda wrong=wrong: list(wrong().values())
    model = ours.Network(layers)
    for block in model.layers:
        block.q_proj.base.weight.data.zero_()
    pieces = [gradients(model, batch) for batch in batches]
    sizes = [len(batch["labels"]) for batch in batches]
    right = combined(pieces, [size / sum(sizes) for size in sizes])
    rule = by_rank(RULES[proxy]) if ranks else RULES[proxy]
    yield "the frozen layers are missing", lambda: list(scored(rule, model, right).values())


def grad_norm(layers, batches):
    yield from network_scores("grad_norm", "grad_norm", layers, batches)


def snip(layers, batches):
    yield from network_scores("snip", "snip", layers, batches)


def snip_ranks(layers, batches):
    yield from network_scores("snip_ranks", "snip", layers, batches, ranks=True)


def synflow(layers):
    def flow(absolute=torch.abs, start=1.0, times=torch.mul):
        """With choices of one's own; R = sum of W_n … W_1 1, W = |W| + s |B| |A|."""
        pairs = [absolute(layer[k]).clone() for layer in layers for k in ("lora_A", "lora_B")]
        pairs = [p.requires_grad_(True) for p in pairs]
        h = start * layers[0]["weight"].new_ones(layers[0]["weight"].shape[1])
        for layer, a, b in zip(layers, pairs[::2], pairs[1::2], strict=True):
            h = absolute(layer["weight"]) @ h + layer["lora_alpha"] / len(a) * b @ (a @ h)
            h = h if layer is layers[-1] else h.relu()
        found = torch.autograd.grad(h.sum(), pairs)
        terms = [times(p, g).abs().sum().item() for p, g in zip(pairs, found, strict=True)]
        return [a + b for a, b in zip(terms[::2], terms[1::2], strict=True)]

    for cause, wrong in rescaled_layers(layers):
        yield cause, call(ours.synflow, wrong)
    yield "the net as it is, without absolute values", call(flow, absolute=torch.clone)
    yield "the gradient alone, without the weight", call(flow, times=lambda p, g: g)
    inner = layers[0]["weight"].shape[1]
    yield "an input of length 1 in place of ones", call(flow, start=inner**-0.5)
    yield "one factor alone: A and B have half each", lambda: [v / 2 for v in flow()]
    bare = [{**layer, "weight": 0 * layer["weight"]} for layer in layers]
    yield "the frozen layers are missing", call(ours.synflow, bare)
    total = sum(flow()) or 1.0
    yield DIVIDED, lambda: [v / total for v in flow()]
    count = [layer["lora_A"].numel() + layer["lora_B"].numel() for layer in layers]
    per = lambda: [v / c for v, c in zip(flow(), count, strict=True)]  # noqa: E731
    yield "divided by the number of parameters", per


# ------------------------------------------------------------------------------- a step of training

NO_MISTAKE = ""
ADAMW_MISTAKES = (
    "L2 in place of decoupled weight decay",
    "no weight decay",
    "weight decay without the learning rate",
    "weight decay after the step, of the new value",
    "no bias correction",
    "SGD in place of AdamW",
)


def adamw_(p, g, state, adamw, mistake, t):
    """A step of AdamW (arXiv 1711.05101, Algorithm 2) or of a wrong kind; t counts from 1."""
    (b1, b2), lr, decay = adamw["betas"], adamw["lr"], adamw["weight_decay"]
    if mistake == "L2 in place of decoupled weight decay":
        g, decay = g + decay * p, 0
    elif mistake == "no weight decay":
        decay = 0
    elif mistake == "weight decay without the learning rate":
        decay = decay / lr
    m = state["exp_avg"] = b1 * state.get("exp_avg", 0) + (1 - b1) * g
    v = state["exp_avg_sq"] = b2 * state.get("exp_avg_sq", 0) + (1 - b2) * g * g
    if mistake != "no bias correction":
        m, v = m / (1 - b1**t), v / (1 - b2**t)
    step = lr * (g if mistake == "SGD in place of AdamW" else m / (v.sqrt() + adamw["eps"]))
    if mistake == "weight decay after the step, of the new value":
        p.copy_((p - step) * (1 - lr * decay))
    else:
        p.copy_((1 - lr * decay) * p - step)


DELTA_MISTAKES = {  # cause: the change of W over lambda, from A, B, A', B' and s
    "lambda without the scale": lambda a, b, new_a, new_b, s: new_b @ new_a - b @ a,
    "second order: (B' - B)(A' - A)": lambda a, b, new_a, new_b, s: s * (new_b - b) @ (new_a - a),
    "first order: (B' - B) A + B (A' - A)": lambda a, b, new_a, new_b, s: (
        s * ((new_b - b) @ a + b @ (new_a - a))
    ),
    "the whole new product instead of the difference": lambda a, b, new_a, new_b, s: (
        s * new_b @ new_a
    ),
    "old minus new": lambda a, b, new_a, new_b, s: s * (b @ a - new_b @ new_a),
    "new plus old": lambda a, b, new_a, new_b, s: s * (b @ a + new_b @ new_a),
    "B' A - B A: the old A with the new B": lambda a, b, new_a, new_b, s: s * (new_b - b) @ a,
    "W does not move": lambda a, b, new_a, new_b, s: torch.zeros_like(b @ a),
}
WHEN_MISTAKES = {  # cause: shift of K
    "W moves one step early (t >= K)": -1,
    "W moves one step late (t counted from 1, or t > K + 1)": 1,
    "W moves from the first step": -(10**9),
}
OLD_MISTAKES = ("the old pair is taken after the decay", "the first old product is 0")
STEP_MISTAKES = (*ADAMW_MISTAKES, *DELTA_MISTAKES, *WHEN_MISTAKES, *OLD_MISTAKES)


def move_(weight, old, new, s, ratio, mistake, first, decay):
    """W <- W + lambda s (B' A' - B A) or a wrong kind; decay: 1 - lr wd; first: W never moved."""
    (a, b), change = old, DELTA_MISTAKES.get(mistake)
    if mistake == "the old pair is taken after the decay":
        a, b = decay * a, decay * b
    elif mistake == "the first old product is 0" and first:
        b = 0 * b
    if change is None:
        weight.add_(ratio * s * (new[1] @ new[0] - b @ a))
    else:
        weight.add_(ratio * change(a, b, *new, s))


def delta_step(weight, old_A, old_B, new_A, new_B, lora_alpha, ratio):
    def step(mistake, s=lora_alpha / len(old_A), ratio=ratio):
        w = weight.clone()
        move_(w, (old_A, old_B), (new_A, new_B), s, ratio, mistake, first=False, decay=1)
        return w

    for cause, s in scales(lora_alpha, len(old_A)).items():
        if s != 0:
            yield cause, call(step, NO_MISTAKE, s)
    for cause in DELTA_MISTAKES:
        if cause != "lambda without the scale":  # in one step that is "no scale"
            yield cause, call(step, cause)
    yield "lambda is missing", call(step, NO_MISTAKE, ratio=1.0)
    s = lora_alpha / len(old_A)
    if weight.shape[0] == weight.shape[1]:
        change = ratio * s * (new_B @ new_A - old_B @ old_A)
        yield "A and B exchanged (delta W transposed)", lambda: weight + change.T
    yield "the change alone, without W", lambda: step(NO_MISTAKE) - weight


@torch.no_grad()
def delta_steps(mistake, weight, lora_A, lora_B, lora_alpha, x, y, ratio, start, steps, adamw):
    """delta_lora with one mistake; gradients in closed form."""
    s, w = lora_alpha / len(lora_A), weight.clone()
    p = {"lora_A": lora_A.clone(), "lora_B": lora_B.clone()}
    state, result, moved = {k: {} for k in p}, [], False
    start += WHEN_MISTAKES.get(mistake, 0)
    for t in range(steps):
        error = x @ (w + s * p["lora_B"] @ p["lora_A"]).T - y
        g = 2 / error.numel() * error.T @ x  # dL/dW, (out, in)
        found = {"lora_A": s * p["lora_B"].T @ g, "lora_B": s * g @ p["lora_A"].T}
        old = tuple(q.clone() for q in p.values())
        for k in p:
            adamw_(p[k], found[k], state[k], adamw, mistake, t + 1)
        if t > start:
            decay = 1 - adamw["lr"] * adamw["weight_decay"]
            move_(w, old, tuple(p.values()), s, ratio, mistake, not moved, decay)
            moved = True
        moments = {f"{m}_{k}": state[k][m] for k in p for m in ("exp_avg", "exp_avg_sq")}
        result.append({k: v.clone() for k, v in {"weight": w, **p, **moments}.items()})
    return result


def delta_lora(**arguments):
    for cause in STEP_MISTAKES:
        yield cause, call(delta_steps, cause, **arguments)
    alpha, r = arguments["lora_alpha"], len(arguments["lora_A"])
    for cause, s in scales(alpha, r).items():
        yield cause, call(delta_steps, NO_MISTAKE, **{**arguments, "lora_alpha": s * r})


def delta_adapter(lora_A, lora_B, lora_alpha, ratio, start):
    def adapter(s, end, begin, at=start + 1):
        a, b = (lora_A[-1], lora_A[at]), (end * lora_B[-1], begin * lora_B[at])
        return {"lora_A": torch.cat(a), "lora_B": s * torch.cat(b, 1)}

    s, last = lora_alpha / lora_A.shape[1], len(lora_A) - 1
    right = (1 + ratio, -ratio)
    for cause, wrong in scales(lora_alpha, lora_A.shape[1]).items():
        yield cause, call(adapter, wrong, *right)
    yield "the change of W alone, without the pair", call(adapter, s, ratio, -ratio)
    yield "the pair alone, without the change of W", call(adapter, s, 1, 0)
    yield "the pair at the beginning is left out", call(adapter, s, 1 + ratio, 0)
    yield "the pair at the beginning is added", call(adapter, s, 1 + ratio, ratio)
    yield "lambda without the scale", call(adapter, 1.0, s + ratio, -ratio)
    yield "W moves from the first step", call(adapter, s, *right, 0)
    yield "the beginning is one step early", call(adapter, s, *right, max(start, 0))
    yield "the beginning is one step late", call(adapter, s, *right, min(start + 2, last))

    def every_step():
        a = torch.cat([lora_A[-1], *lora_A[start + 1 :]])
        changes = [lora_B[start + 1] * -ratio, *(0 * b for b in lora_B[start + 2 : -1])]
        b = torch.cat([lora_B[-1], *changes, ratio * lora_B[-1]], 1)
        return {"lora_A": a, "lora_B": s * b}

    yield "one part for every step, where two products are enough", every_step


# ----------------------------------------------------------------------------- a run of both methods

RUN_MISTAKES = (
    "decided once, before the first step alone",
    "decided after the step, not before it",
    "decided every step",
    "scored on the first batch alone",
    "scored on the batch of the step",
    "scored on all batches",
    "scored batch by batch, then averaged",
    "scored by snip",
    "modules that are off are not scored, or score 0",
    "the worst are kept",
    "everything is on",
    "B of what is off is set to 0",
    "moments of what is off are forgotten",
    "a new optimizer at every decision",
    "W of what is off goes back to W_0",
    "modules that are off decay",
    "modules that are off get steps, with gradient 0",
    "modules that are off stay in the forward pass",
    "modules that are off are trained",
    "Adam's t counts the steps of the run, also for what was off",
    "the gradients of scoring are left in .grad",
)


def run_score(mistake, model, batches, s, step):
    """{name: score}, GRAD-NORM, before this step; with gradients, which a mistake leaves behind."""
    layers = lora.adapters(model)
    on = {name: layer.enabled for name, layer in layers.items()}
    used = batches[: s["score_batches"]]
    if mistake == "scored on the first batch alone":
        used = batches[:1]
    elif mistake == "scored on the batch of the step":
        used = [batches[step]]
    elif mistake == "scored on all batches":
        used = batches
    rule = RULES["snip" if mistake == "scored by snip" else "grad_norm"]
    for layer in layers.values():
        layer.enabled = True
    sizes = [len(batch["labels"]) for batch in used]
    parts = [gradients(model, batch) for batch in used]
    found = combined(parts, [size / sum(sizes) for size in sizes])
    scores = scored(rule, model, found)
    if mistake == "scored batch by batch, then averaged":
        each = [scored(rule, model, part) for part in parts]
        scores = {name: sum(e[name] for e in each) / len(each) for name in layers}
    for name, layer in layers.items():
        layer.enabled = on[name]
    if mistake == "modules that are off are not scored, or score 0":
        scores = {name: value * on[name] for name, value in scores.items()}
    return scores, found


def run_decide(mistake, model, batches, s, step, state, original, together):
    """Score, choose, switch; returns (names that are on, gradients of the scores)."""
    layers = lora.adapters(model)
    scores, found = run_score(mistake, model, batches, s, step)
    if mistake == "the worst are kept":
        scores = {name: -value for name, value in scores.items()}
    keep = 1.0 if mistake == "everything is on" else s["keep"]
    chosen = allocate.keep_top(scores, keep, together)
    for name, layer in layers.items():
        layer.enabled = name in chosen
        if name in chosen:
            continue
        if mistake == "B of what is off is set to 0":
            layer.lora_B.data.zero_()
        elif mistake == "moments of what is off are forgotten":
            state.pop(layer.lora_A, None)
            state.pop(layer.lora_B, None)
        elif mistake == "W of what is off goes back to W_0" and name in original:
            layer.base.weight.data.copy_(original[name])
    if mistake == "a new optimizer at every decision":
        state.clear()
    return chosen, found


def run_step(mistake, model, batch, s, step, state, leftover):
    """Forward, backward, and a step of AdamW for what takes part; returns the loss."""
    layers = lora.adapters(model)
    off = {n: layer for n, layer in layers.items() if not layer.enabled}
    here = mistake in (
        "modules that are off stay in the forward pass",
        "modules that are off are trained",
    )
    for layer in off.values():
        layer.enabled = here
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = model(**batch).loss
    found = dict(zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))
    for layer in off.values():
        layer.enabled = False
        for p in (layer.lora_A, layer.lora_B):
            if mistake == "modules that are off get steps, with gradient 0":
                found[p] = torch.zeros_like(p)
            elif mistake == "modules that are off decay":
                p.data.mul_(1 - s["adamw"]["lr"] * s["adamw"]["weight_decay"])
            if mistake != "modules that are off are trained" and here:
                found[p] = None
    for name, layer in layers.items() if leftover else ():
        for p, g in zip((layer.lora_A, layer.lora_B), leftover[name], strict=True):
            found[p] = g if found[p] is None else found[p] + g
    for p, g in found.items():
        if g is not None:
            own = state.setdefault(p, {})
            own["t"] = own.get("t", 0) + 1
            t = step + 1 if mistake.startswith("Adam's t") else own["t"]
            adamw_(p.data, g, own, s["adamw"], mistake, t)
    return loss.item()


def wrong_run(mistake, model, batches, s, together=True):
    """The loop of ours.run with one mistake, AdamW and the change of W written out."""
    layers = lora.adapters(model)
    linear = {n: a for n, a in layers.items() if isinstance(a.base, torch.nn.Linear)}
    original = {name: layer.base.weight.detach().clone() for name, layer in linear.items()}
    start = s["delta_start"] + WHEN_MISTAKES.get(mistake, 0)
    every = 1 if mistake == "decided every step" else s["every"]
    losses, decisions, state, moved = [], [], {}, set()
    for step, batch in enumerate(batches):
        late = mistake == "decided after the step, not before it"
        due = step % every == 0 and (step == 0 or mistake != "decided once, before the first step alone")
        leftover = None
        for when in ("before", "after"):
            if due and (when == "after") == late:
                arguments = (mistake, model, batches, s, step, state, original, together)
                chosen, found = run_decide(*arguments)
                decisions.append(chosen)
                leftover = found if mistake == "the gradients of scoring are left in .grad" else None
            if when == "after":
                continue
            old = {n: (a.lora_A.detach().clone(), a.lora_B.detach().clone()) for n, a in linear.items()}
            was_on = [name for name, layer in linear.items() if layer.enabled]
            losses.append(run_step(mistake, model, batch, s, step, state, leftover))
            for name in was_on if step > start else ():
                layer, decay = linear[name], 1 - s["adamw"]["lr"] * s["adamw"]["weight_decay"]
                new = layer.lora_A.detach(), layer.lora_B.detach()
                weight, first = layer.base.weight.data, name not in moved
                move_(weight, old[name], new, layer.scaling, s["delta_ratio"], mistake, first, decay)
                moved.add(name)
    return losses, decisions


def short_run(layers, batches, settings):
    def result(mistake, layers=layers):
        model = ours.Network(layers)
        losses, decisions = wrong_run(mistake, model, batches, settings)
        order = {name: i for i, name in enumerate(lora.adapters(model))}
        pairs = list(lora.adapters(model).values())
        return {
            "losses": losses,
            "on": [sorted(order[name] for name in chosen) for chosen in decisions],
            "adapters": [ours.pair_of(layer) for layer in pairs],
            "weights": [layer.base.weight.detach() for layer in pairs],
        }

    for cause in (*RUN_MISTAKES, *STEP_MISTAKES):
        yield cause, call(result, cause)
    for cause, wrong in rescaled_layers(layers):
        yield cause, call(result, NO_MISTAKE, wrong)


# ------------------------------------------------------------------------------------- a transformer


def rescaled(adapters):
    """(cause, the adapters with an alpha that makes the mistake of scales())."""
    for cause in scales(1, 1):
        wrong = {}
        for path, a in adapters.items():
            r = len(a["lora_A"])
            wrong[path] = {**a, "lora_alpha": scales(a["lora_alpha"], r)[cause] * r}
        yield cause, wrong


def undivided(config, weights, adapters):
    """Weights and adapters in which q is sqrt(d / h) times what it was."""
    root = math.sqrt(config["hidden_size"] / config["num_attention_heads"])
    ends = ("self.query", "q_proj")
    weights = {
        name: root * value if name.rpartition(".")[0].endswith(ends) else value
        for name, value in weights.items()
    }
    adapters = {
        path: {**a, "lora_B": root * a["lora_B"]} if path.endswith(ends) else a
        for path, a in adapters.items()
    }
    return weights, adapters


def model_mistakes(config, weights, adapters, batches):
    """(cause, (config, weights, adapters, batches)) with which our own model makes that mistake."""
    for cause, wrong in rescaled(adapters):
        yield cause, (config, weights, wrong, batches)
    blind = [{**b, "attention_mask": torch.ones_like(b["attention_mask"])} for b in batches]
    undivided_q = undivided(config, weights, adapters)
    yield "attention without the division by sqrt(d / h)", (config, *undivided_q, batches)
    if config["model_type"] == "opt":
        yield "the last position is read, not the last token", (config, weights, adapters, blind)
        name = "model.decoder.embed_positions.weight"
        early = {**weights, name: weights[name].roll(2, 0)}
        yield "positions from row 0 of OPT's table, not row 2", (config, early, adapters, batches)
        return
    yield "padding is attended to (the mask is forgotten)", (config, weights, adapters, blind)
    tanh = {**config, "hidden_act": "gelu_new"}
    yield "tanh GELU in place of the exact one", (tanh, weights, adapters, batches)
    eps = {**config, "layer_norm_eps": 1e-12}
    yield "LayerNorm's eps is 1e-12, not the config's", (eps, weights, adapters, batches)
    zeros = [{**b, "token_type_ids": 0 * b["token_type_ids"]} for b in batches]
    yield "token_type_ids are ignored, all are 0", (config, weights, adapters, zeros)
    name = "bert.embeddings.token_type_embeddings.weight"
    without = {**weights, name: 0 * weights[name]}
    yield "token types are left out of the embeddings", (config, without, adapters, batches)


def logits(config, weights, adapters, batch):
    for cause, (c, w, a, (b,)) in model_mistakes(config, weights, adapters, [batch]):
        yield cause, call(ours.logits, c, w, a, b)
    for place in lora.RESIDUALS + lora.CROSS:
        fewer = {path: a for path, a in adapters.items() if not path.endswith(place)}
        if len(fewer) < len(adapters):
            yield f"{place} is missing", call(ours.logits, config, weights, fewer, batch)
    if not any(path.endswith("residual_1") for path in adapters):
        return

    def replaced():
        model, _ = ours.build(config, weights, adapters)
        for name, layer in lora.adapters(model).items():
            if name.endswith(lora.RESIDUALS):
                layer.base = lora.Zero()
        return model(**batch).logits.detach()

    yield "a residual's pair replaces the identity, not added to it", replaced


FACTORS = {  # of the right scores, where a mistake is only that
    "grasp": {"the other sign": -1.0, "half of it": 0.5},
    "fisher": {"without the 1/2": 2.0},
    "alpha_test": {"a from 0 to 1 instead of 0 to 10": 0.1},
    "alpha_test_released": {"a from 0 to 1 instead of 0 to 10": 0.1},
}
RELATED = {
    "synflow": "synflow_released",
    "synflow_released": "synflow",
    "alpha_test": "alpha_test_released",
    "alpha_test_released": "alpha_test",
    "grad_norm": "grad_norm_slot",
    "grad_norm_slot": "grad_norm",
    "snip": "snip_slot",
    "snip_slot": "snip",
}


def scores(proxy, config, weights, adapters, batches):
    given = (config, weights, adapters, batches)
    if proxy in RULES:
        model, paths = ours.build(config, weights, adapters)
        for cause, wrong in score_mistakes(proxy, model, batches):
            yield cause, lambda wrong=wrong: {paths[name]: v for name, v in wrong().items()}

    def times(factor):
        return {path: factor * value for path, value in ours.scores(proxy, *given).items()}

    factors = dict(FACTORS.get(proxy, {}))
    if proxy == "fisher":
        factors["sum over examples instead of the mean"] = sum(len(b["labels"]) for b in batches)
    for cause, factor in factors.items():
        yield cause, call(times, factor)
    if proxy in RELATED:
        yield f"this is {RELATED[proxy]}", call(ours.scores, RELATED[proxy], *given)
    if proxy.startswith("alpha") or proxy == "constant":
        return  # the first are small integers, which many mistakes have in common
    for cause, wrong in model_mistakes(*given):
        yield cause, call(ours.scores, proxy, *wrong)


def rank_scores(proxy, config, weights, adapters, batches):
    for cause, wrong in model_mistakes(config, weights, adapters, batches):
        yield cause, call(ours.rank_scores, proxy, *wrong)
    model, paths = ours.build(config, weights, adapters)
    for cause, wrong in score_mistakes(proxy, model, batches, ranks=True):
        yield cause, lambda wrong=wrong: {paths[name]: v for name, v in wrong().items()}


def train(config, weights, adapters, batches, settings):
    def result(mistake, together=True, given=(config, weights, adapters, batches), head=True):
        model, paths = ours.build(*given[:3])
        for name in () if head else model.head:
            model.get_submodule(name).requires_grad_(False)
        losses, decisions = wrong_run(mistake, model, given[3], settings, together)
        layers = {paths[name]: layer for name, layer in lora.adapters(model).items()}
        return {
            "losses": losses,
            "on": [sorted(paths[name] for name in chosen) for chosen in decisions],
            "adapters": {path: ours.pair_of(layer) for path, layer in layers.items()},
            "weights": {
                path: layer.base.weight.detach()
                for path, layer in layers.items()
                if isinstance(layer.base, torch.nn.Linear)
            },
        }

    for cause in (*RUN_MISTAKES, *STEP_MISTAKES):
        yield cause, call(result, cause)
    yield "ranked apart, not together", call(result, NO_MISTAKE, together=False)
    yield "the head is not trained", call(result, NO_MISTAKE, head=False)
    for cause, wrong in model_mistakes(config, weights, adapters, batches):
        yield cause, call(result, NO_MISTAKE, given=wrong)
