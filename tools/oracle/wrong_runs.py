"""Wrong training: AdamW, Delta-LoRA and the loop of both methods, written out, with one mistake.

    adamw_, move_    a step of AdamW, and of W; ADAMW_, DELTA_, WHEN_ and OLD_MISTAKES
    delta_steps      delta_lora of the interface
    run              the loop of short_run and train; RUN_MISTAKES beside those of a step

With NO_MISTAKE all are right: a second derivation of ours.py, which a test compares with it.

What this file does not do: know which function of the interface asks (causes.py).
"""

import torch

import allocate
import lora
from tools.oracle.wrong_scores import RULES, combined, gradients, scored

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


# ---------------------------------------------------------------------------- a run of both methods

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
    "modules that were on get steps with gradient 0 (zero_grad leaves 0, not None)",
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
    off = [layer for layer in layers.values() if not layer.enabled]
    trained = mistake == "modules that are off are trained"
    zeros = mistake == "modules that are off get steps, with gradient 0"
    left = mistake.startswith("modules that were on get steps")
    for layer in off:
        layer.enabled = trained or mistake == "modules that are off stay in the forward pass"
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = model(**batch).loss
    gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
    found = dict(zip(parameters, gradient, strict=True))
    for layer in off:
        layer.enabled = False
        for p in (layer.lora_A, layer.lora_B):
            if not trained:
                found[p] = torch.zeros_like(p) if zeros or (left and p in state) else None
            if mistake == "modules that are off decay":
                p.data.mul_(1 - s["adamw"]["lr"] * s["adamw"]["weight_decay"])
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


def run(mistake, model, batches, s, together=True):
    """The loop of ours.run with one mistake, AdamW and the change of W written out."""
    layers = lora.adapters(model)
    linear = {n: a for n, a in layers.items() if isinstance(a.base, torch.nn.Linear)}
    original = {name: layer.base.weight.detach().clone() for name, layer in linear.items()}
    start = s["delta_start"] + WHEN_MISTAKES.get(mistake, 0)
    every = {
        "decided every step": 1,
        "decided once, before the first step alone": len(batches),
    }.get(mistake, s["every"])
    late = mistake == "decided after the step, not before it"
    decay = 1 - s["adamw"]["lr"] * s["adamw"]["weight_decay"]
    losses, decisions, state, moved = [], [], {}, set()

    def decide(step):
        arguments = (mistake, model, batches, s, step, state, original, together)
        chosen, found = run_decide(*arguments)
        decisions.append(chosen)
        return found if mistake == "the gradients of scoring are left in .grad" else None

    for step, batch in enumerate(batches):
        due = step % every == 0
        leftover = decide(step) if due and not late else None
        old = {n: pair_of(layer) for n, layer in linear.items() if layer.enabled}
        losses.append(run_step(mistake, model, batch, s, step, state, leftover))
        for name in old if step > start else ():
            layer, first = linear[name], name not in moved
            factor = (layer.scaling, s["delta_ratio"])
            weight, new = layer.base.weight.data, pair_of(layer)
            move_(weight, old[name], new, *factor, mistake, first, decay)
            moved.add(name)
        if due and late:
            decide(step)
    return losses, decisions


def pair_of(layer):
    return layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
