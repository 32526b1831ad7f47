"""Wrong scores: GRAD-NORM and SNIP of any model with adapters, with one mistake each.

    RULES            pair and gradients -> score, as it should be
    WRONG_RULES      other ways from the right gradients to a score
    score_mistakes   these, and the right way from other gradients: summed, of one batch alone, …

What this file does not do: know which function of the interface asks (causes.py).
"""

import torch

import lora
from tools.oracle.mistakes import call

RULES = {  # pair A, B with gradients a, b -> score
    "grad_norm": lambda A, a, B, b: a.norm() + b.norm(),
    "snip": lambda A, a, B, b: (A * a).abs().sum() + (B * b).abs().sum(),
}
WRONG_RULES = {
    "grad_norm": {
        "the norm of both factors together": lambda A, a, B, b: (
            (a.norm() ** 2 + b.norm() ** 2) ** 0.5
        ),
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
        name: tuple(
            sum(s * part[name][i] for s, part in zip(shares, parts, strict=True)) for i in (0, 1)
        )
        for name in parts[0]
    }


def scored(rule, model, found):
    """{name: score} from gradients; a number, or for ranks a list."""
    pairs = {
        n: (layer.lora_A.detach(), layer.lora_B.detach())
        for n, layer in lora.adapters(model).items()
    }
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
