"""What people get wrong: wrong variants of every function of the oracle, each with its name.

A function here has the name and the arguments of one of ours.py, and yields (cause, wrong): wrong()
is what a candidate with that mistake, and no other, returns or raises. check.py compares a
candidate's wrong answer with each of them.

Scores and training, which several functions share, are in wrong_scores.py and wrong_runs.py; the
functions of the relatives in causes_adapters.py and causes_rules.py.

What this file does not do: compute the right answer (ours.py), or judge (check.py).
"""

import math

import torch

import allocate
import lora
from tools.oracle import ours, wrong_runs
from tools.oracle.causes_adapters import (  # noqa: F401  of functions of the interface
    adalora,
    asymmetry,
    condlora,
    cora,
    dora,
    lora_xs,
    prolora,
    reslora,
    sbora_fa,
    sbora_fb,
    tied,
    weight_change,
)
from tools.oracle.causes_rules import (  # noqa: F401  of functions of the interface
    adalora_keep,
    adalora_penalty,
    adalora_schedule,
    adalora_scores,
    alora_exchange,
    alora_importance,
    lora_pro,
    lora_rite,
    loraplus,
    riemannian,
    riemannian_step,
)
from tools.oracle.mistakes import call, scales
from tools.oracle.wrong_runs import DELTA_MISTAKES, NO_MISTAKE, RUN_MISTAKES, STEP_MISTAKES
from tools.oracle.wrong_scores import (
    RULES,
    by_rank,
    combined,
    gradients,
    score_mistakes,
    scored,
)

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
    stored = "W is (in, out), and is not transposed" if transposed else "W is transposed"
    yield stored, call(y, w.T, s)


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
    stored = "W is (in, out), and is not transposed" if transposed else "W is transposed"
    yield stored, call(gradients, w.T, s)


def merge(weight, lora_A, lora_B, lora_alpha, transposed):
    delta, s = lora_B @ lora_A, lora_alpha / len(lora_A)
    right = delta.T if transposed else delta
    for cause, wrong in scales(lora_alpha, len(lora_A)).items():
        yield cause, call(torch.add, weight, wrong * right)
    yield "subtracted instead of added", call(torch.sub, weight, s * right)
    yield "delta W alone, without W", lambda: s * right
    if transposed:
        yield "delta W is not transposed, but W is (in, out)", lambda: weight + s * delta
        yield (
            "the merged weight is (out, in), but W came as (in, out)",
            lambda: weight.T + s * delta,
        )
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


# ---------------------------------------------------------------------------------- a small network


def rescaled_layers(layers):
    """(cause, the layers with an alpha that makes the mistake of scales())."""
    for cause in scales(1, 1):
        wrong = []
        for layer in layers:
            r = len(layer["lora_A"])
            wrong.append({**layer, "lora_alpha": scales(layer["lora_alpha"], r)[cause] * r})
        yield cause, wrong


class NoReLU(ours.Network):
    def encode(self, x, mask=None):
        for block in self.layers:
            x = block.q_proj(x)
        return x


class LastReLU(ours.Network):
    def encode(self, x, mask=None):
        return super().encode(x).relu()


WRONG_NETWORKS = {
    "no ReLU between the layers": NoReLU,
    "ReLU after the last layer too": LastReLU,
}


def network_scores(name, proxy, layers, batches, ranks=False):
    for cause, wrong in rescaled_layers(layers):
        yield cause, call(getattr(ours, name), wrong, batches)
    for cause, wrong in score_mistakes(proxy, ours.Network(layers), batches, ranks):
        yield cause, lambda wrong=wrong: list(wrong().values())
    rule = by_rank(RULES[proxy]) if ranks else RULES[proxy]
    sizes = [len(batch["labels"]) for batch in batches]

    def of(model):
        parts = [gradients(model, batch) for batch in batches]
        right = combined(parts, [size / sum(sizes) for size in sizes])
        return list(scored(rule, model, right).values())

    for cause, kind in WRONG_NETWORKS.items():
        yield cause, lambda kind=kind: of(kind(layers))
    bare = [{**layer, "weight": 0 * layer["weight"]} for layer in layers]
    yield "the frozen layers are missing", lambda: of(ours.Network(bare))


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
    yield "divided by the sum over all layers", lambda: [v / total for v in flow()]
    sizes = [layer["lora_A"].numel() + layer["lora_B"].numel() for layer in layers]
    per = call(map, float.__truediv__, flow(), map(float, sizes))
    yield "divided by the number of parameters", lambda: list(per())


def short_run(layers, batches, settings):
    def result(mistake, layers=layers, kind=ours.Network):
        model = kind(layers)
        losses, decisions = wrong_runs.run(mistake, model, batches, settings)
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
    for cause, kind in WRONG_NETWORKS.items():
        yield cause, call(result, NO_MISTAKE, kind=kind)


# --------------------------------------------------------------------------------------- Delta-LoRA


def delta_step(weight, old_A, old_B, new_A, new_B, lora_alpha, ratio):
    right = lora_alpha / len(old_A)

    def step(mistake, s=right, ratio=ratio):
        w = weight.clone()
        wrong_runs.move_(w, (old_A, old_B), (new_A, new_B), s, ratio, mistake, first=False, decay=1)
        return w

    for cause, s in scales(lora_alpha, len(old_A)).items():
        if s != 0:
            yield cause, call(step, NO_MISTAKE, s)
    for cause in DELTA_MISTAKES:
        if cause != "lambda without the scale":  # in one step that is "no scale"
            yield cause, call(step, cause)
    yield "lambda is missing", call(step, NO_MISTAKE, ratio=1.0)
    if weight.shape[0] == weight.shape[1]:
        change = ratio * right * (new_B @ new_A - old_B @ old_A)
        yield "A and B exchanged (delta W transposed)", lambda: weight + change.T
    yield "the change alone, without W", lambda: step(NO_MISTAKE) - weight


def delta_lora(**arguments):
    for cause in STEP_MISTAKES:
        yield cause, call(wrong_runs.delta_steps, cause, **arguments)
    alpha, r = arguments["lora_alpha"], len(arguments["lora_A"])
    for cause, s in scales(alpha, r).items():
        yield cause, call(wrong_runs.delta_steps, NO_MISTAKE, **{**arguments, "lora_alpha": s * r})


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


# ------------------------------------------------------------------------------------ a transformer


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
        losses, decisions = wrong_runs.run(mistake, model, given[3], settings, together)
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
