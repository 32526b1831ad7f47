"""What people get wrong: optimizer rules and rank budgets; a part of causes.py.

The loops are written out, with at most one mistake; with NO_MISTAKE they are right, a second
derivation of ours_rules.py.

What this file does not do: compute with relatives/ (ours_rules.py does).
"""

import itertools
import math

import torch

from tools.oracle.mistakes import call
from tools.oracle.network import Network
from tools.oracle.wrong_runs import ADAMW_MISTAKES, NO_MISTAKE, adamw_

PAIR = ("lora_A", "lora_B")
NO_SCALE = "no scale in gA and gB"

# ------------------------------------------------------------------------- AdamW on other gradients


@torch.no_grad()
def adamw_steps(
    mistake, lora_A, lora_B, lora_alpha, gradients, adamw, rule=None, rates=(1, 1), **options
):
    """AdamW on what rule(A, B, gA, gB) makes of the gradients, with one mistake.

    Args:
        rates: of A and of B, times lr. options: after: the rule is for the direction, not for the
            gradient; early: steps are counted from 2; in_turn: B's rule sees the new A;
            decays: as rates, of the weight decay alone; times: as rates, of the gradients; s: the
            scaling of the gradients.
    """
    p = {"lora_A": lora_A.clone(), "lora_B": lora_B.clone()}
    state, result = {k: {} for k in p}, []
    decays = options.get("decays", (1, 1))
    s = options.get("s", lora_alpha / len(lora_A))
    of_A, of_B = options.get("times", (1, 1))
    for t, G in enumerate(gradients):
        gA, gB = of_A * s * p["lora_B"].T @ G, of_B * s * G @ p["lora_A"].T
        found = {"lora_A": gA, "lora_B": gB}
        g = dict(found)
        if rule and not options.get("after"):
            g = dict(zip(PAIR, rule(*p.values(), *found.values()), strict=True))
        for k, rate, decay in zip(PAIR, rates, decays, strict=True):
            settings = {**adamw, "lr": rate * adamw["lr"]}
            settings["weight_decay"] = decay * adamw["weight_decay"]
            if options.get("in_turn") and k == "lora_B":
                g["lora_B"] = rule(*p.values(), *found.values())[1]
            at = t + 2 if options.get("early") else t + 1
            if options.get("after"):
                preconditioned_step_(p, k, g[k], state[k], settings, rule, at)
            else:
                adamw_(p[k], g[k], state[k], settings, mistake, at)
        moments = {f"{m}_{k}": state[k][m] for k in p for m in ("exp_avg", "exp_avg_sq")}
        result.append({k: v.clone() for k, v in {**p, **moments}.items()})
    return result


def preconditioned_step_(p, k, g, state, adamw, rule, t):
    """AdamW's moments of the plain gradient; the rule is for the direction that they give."""
    before = p[k].clone()
    adamw_(p[k], g, state, {**adamw, "weight_decay": 0}, NO_MISTAKE, t)
    direction = (before - p[k]) / adamw["lr"]
    p[k].copy_(before)
    pair = {name: direction if name == k else torch.zeros_like(p[name]) for name in PAIR}
    made = dict(zip(PAIR, rule(*p.values(), *pair.values()), strict=True))[k]
    p[k].sub_(adamw["lr"] * (made + adamw["weight_decay"] * before))


def adamw_mistakes(steps):
    """steps: a function of the mistake."""
    for cause in ADAMW_MISTAKES:
        yield cause, call(steps, cause)


def loraplus(ratio, **given):
    def steps(mistake=NO_MISTAKE, rates=(1, ratio), **options):
        return adamw_steps(mistake, **given, rates=rates, **options)

    yield from adamw_mistakes(steps)
    yield "A and B swapped: A learns faster", call(steps, rates=(ratio, 1))
    yield "one rate for both, lr", call(steps, rates=(1, 1))
    yield "one rate for both, ratio * lr", call(steps, rates=(ratio, ratio))
    yield "B decays at lr, not at ratio * lr", call(steps, decays=(1, 1 / ratio))
    yield "A decays at ratio * lr, too", call(steps, decays=(ratio, 1))
    yield "the rate of A is lr / ratio, that of B lr", call(steps, rates=(1 / ratio, 1))
    yield "the rate of B is lr / ratio", call(steps, rates=(1, 1 / ratio))
    yield "the rate of B is sqrt(ratio) * lr", call(steps, rates=(1, ratio**0.5))
    divided = "the ratio is on B's gradient, which AdamW divides away"
    yield divided, call(steps, rates=(1, 1), times=(1, ratio))
    yield NO_SCALE, call(steps, s=1.0)


def metrics(A, B, delta):
    eye = torch.eye(len(A)).to(A)
    return B.T @ B + delta * eye, A @ A.T + delta * eye


def power(metric, exponent):
    """A symmetric positive matrix to some power."""
    values, vectors = torch.linalg.eigh(metric)
    return vectors * values**exponent @ vectors.T


def preconditioner(delta, exponent=-1.0, kind=NO_MISTAKE):
    """A rule for adamw_steps; exponent: of the metric."""

    def rule(A, B, gA, gB):
        of_B, of_A = metrics(A, B, delta)
        if kind == "swapped":
            of_B, of_A = of_A, of_B
        elif kind == "added after":
            bare_B, bare_A = metrics(A, B, 0)
            return (
                torch.linalg.pinv(bare_B) @ gA + delta * gA,
                gB @ torch.linalg.pinv(bare_A) + delta * gB,
            )
        new_A, new_B = power(of_B, exponent) @ gA, gB @ power(of_A, exponent)
        return gA if kind == "B alone" else new_A, gB if kind == "A alone" else new_B

    return rule


def precondition_mistakes(delta):
    """{cause: rule}."""
    return {
        "not preconditioned": lambda A, B, gA, gB: (gA, gB),
        "A's gradient through A's metric, B's through B's": preconditioner(delta, kind="swapped"),
        "the metric in place of its inverse": preconditioner(delta, 1.0),
        "the root of the inverse metric": preconditioner(delta, -0.5),
        "A alone is preconditioned": preconditioner(delta, kind="A alone"),
        "B alone is preconditioned": preconditioner(delta, kind="B alone"),
    }


DELTA_LEFT_OUT = "delta is left out"
DELTA_AFTER = "delta is added to the inverse, not to the metric"


UNTIL_B = "at B = 0 the gradients stay as they are"


def unless_zero(rule):
    return lambda A, B, gA, gB: rule(A, B, gA, gB) if B.any() else (gA, gB)


def riemannian(delta, **given):
    right = preconditioner(delta)

    def steps(mistake=NO_MISTAKE, rule=right, **options):
        return adamw_steps(mistake, **given, rule=rule, **options)

    yield from adamw_mistakes(steps)
    for cause, rule in precondition_mistakes(delta).items():
        yield cause, call(steps, rule=rule)
    yield "the moments are of the plain gradients", call(steps, after=True)
    yield "B's metric is that of the new A, as published", call(steps, in_turn=True)
    yield "delta is squared", call(steps, rule=preconditioner(delta**2))
    yield NO_SCALE, call(steps, s=1.0)
    yield UNTIL_B, call(steps, rule=unless_zero(right))
    if given["lora_B"].any():  # at B = 0 there is no inverse without it
        yield DELTA_LEFT_OUT, call(steps, rule=preconditioner(0))
        yield DELTA_AFTER, call(steps, rule=preconditioner(delta, kind="added after"))


def riemannian_step(lora_A, lora_B, gradient, lora_alpha, lr, delta):
    right, scaling = preconditioner(delta), lora_alpha / len(lora_A)

    def step(rule=right, s=scaling, lr=lr, in_turn=False, pair=None):
        gA, gB = s * lora_B.T @ gradient, s * gradient @ lora_A.T
        new_A, new_B = rule(lora_A, lora_B, gA, gB)
        A = lora_A - lr * new_A
        if in_turn:
            new_B = rule(A, lora_B, gA, s * gradient @ A.T if pair else gB)[1]
        B = lora_B - lr * new_B
        return {"lora_A": A, "lora_B": B, "product": scaling * B @ A}

    def first_order():
        A, B = (step()[k] for k in PAIR)
        change = (B - lora_B) @ lora_A + lora_B @ (A - lora_A)
        return {"lora_A": A, "lora_B": B, "product": scaling * (lora_B @ lora_A + change)}

    for cause, rule in precondition_mistakes(delta).items():
        yield cause, call(step, rule)
    yield "B's metric is that of the new A, as published", call(step, in_turn=True)
    yield "B's metric and gradient are those of the new A", call(step, in_turn=True, pair=True)
    yield NO_SCALE, call(step, s=1.0)
    yield "uphill: plus, not minus", call(step, lr=-lr)
    yield "without the learning rate", call(step, lr=1.0)
    yield (
        "the product without the scale",
        lambda: {
            **step(),
            "product": step()["product"] / scaling,
        },
    )
    yield "the product of the old pair", lambda: {**step(), "product": scaling * lora_B @ lora_A}
    yield (
        "the change of the product, not the product",
        lambda: {
            **step(),
            "product": step()["product"] - scaling * lora_B @ lora_A,
        },
    )
    yield "the product to first order", first_order
    if not delta:
        yield "delta is at least 1e-6", call(step, preconditioner(1e-6))
    else:
        yield DELTA_LEFT_OUT, call(step, preconditioner(0))
        yield DELTA_AFTER, call(step, preconditioner(delta, kind="added after"))
        yield "delta is squared", call(step, preconditioner(delta**2))


# ----------------------------------------------------------------------------------------- LoRA-Pro


def pro_rule(s, mistake=NO_MISTAKE):
    """The two gradients; X by a linear system of r^2 unknowns."""

    def rule(A, B, gA, gB):
        of_B, of_A = (torch.linalg.pinv(m) for m in metrics(A, B, 0))
        if mistake == RIDGE:
            of_B, of_A = (torch.linalg.inv(m) for m in metrics(A, B, 1e-8))
        new_A, new_B = of_B @ gA / s**2, gB @ of_A / s**2
        if mistake != "P_B is not taken out of B's gradient":
            new_B = new_B - B @ (of_B @ (B.T @ new_B))
        eye = torch.eye(len(A)).to(A)
        system = torch.kron(B.T @ B, eye) + torch.kron(eye, A @ A.T)  # of X, row by row
        X = torch.linalg.solve(system, (-new_A @ A.T).flatten()).view(len(A), -1)
        signs = {
            NO_MISTAKE: (1, -1),
            "X has the other sign": (-1, 1),
            "X is left out": (0, 0),
            "X A is added, B X is not taken off": (1, 0),
            "both with plus: X does not cancel": (1, 1),
            "half of X": (0.5, -0.5),
            "X is transposed": (1, -1),
        }
        X = X.T if mistake == "X is transposed" else X
        plus, minus = signs.get(mistake, signs[NO_MISTAKE])
        return new_A + plus * X @ A, new_B + minus * B @ X

    return rule


RIDGE = "1e-8 on the diagonal of the Gram matrices, as published"
PRO_MISTAKES = (
    RIDGE,
    "P_B is not taken out of B's gradient",
    "X has the other sign",
    "X is left out",
    "X A is added, B X is not taken off",
    "both with plus: X does not cancel",
    "half of X",
    "X is transposed",
)


def lora_pro(**given):
    lora_B, s = given["lora_B"], given["lora_alpha"] / len(given["lora_A"])

    def steps(mistake=NO_MISTAKE, rule=None, **options):
        return adamw_steps(mistake, **given, rule=rule or pro_rule(s), **options)

    yield from adamw_mistakes(steps)
    for cause in PRO_MISTAKES:
        if lora_B.any() or "P_B" in cause:
            yield cause, call(steps, rule=pro_rule(s, cause))
    scales = {
        "1 / s in place of 1 / s^2": s**0.5,
        "without 1 / s^2": 1.0,
        "scale 2 whatever lora_alpha / r is, as published": 2.0,
    }
    for cause, wrong in scales.items():
        yield cause, call(steps, rule=pro_rule(wrong))
    plain = call(steps, rule=lambda A, B, gA, gB: (gA, gB))
    yield "the gradients as they are, plain AdamW", plain
    yield UNTIL_B, call(steps, rule=unless_zero(pro_rule(s)))
    yield "bias correction is one step ahead, counted from 2, as published", call(steps, early=True)
    if lora_B.any():
        yield "B's gradient is made with the new A", call(steps, in_turn=True)
    yield NO_SCALE, call(steps, s=1.0)


# ---------------------------------------------------------------------------------------- LoRA-RITE

CLIPPED_FIRST = "clipped before a gradient is set to 0, not after: so none ever is"
WAITS = "a factor is not stepped at all while the other one is 0, decay and count included"
RITE_MISTAKES = (
    CLIPPED_FIRST,
    "the whole step of a factor is skipped where its rms is above 1",
    "the step of both is skipped where one rms is above 1",
    "not clipped",
    "each factor is clipped by its own norm",
    "beta1 and beta2 as they are, without bias correction",
    "the second moment is not divided by n",
    "the second moment does not turn",
    "the first moment does not turn",
    "turned the other way, by P^T",
    "eps under the root",
    "the inverse of V in place of its root",
    "averaged before V^(-1/2), not after",
    "the step by R^-1, not R^-T",
    "the step is not magnified back by R^-T",
    "the gradient is not un-magnified by R^-1",
    "the QR of the factor itself, not of the other one",
    "no weight decay",
    "weight decay of the new value",
    "weight decay without the learning rate",
    NO_SCALE,
    WAITS,
)


def rite_gradient(Y, Z, grad, mistake):
    """(g, U, R^-1, whether its rms is above 1) of one factor."""
    if mistake == "the QR of the factor itself, not of the other one":
        R = torch.linalg.qr(Z)[1]
        U = torch.linalg.qr(Y)[0]
    else:
        U, R = torch.linalg.qr(Y)
    sign = torch.where(R.diagonal() < 0, -1.0, 1.0)
    U, R = U * sign, sign[:, None] * R
    inverse = torch.linalg.pinv(R, rtol=len(Y) * torch.finfo(Y.dtype).eps)
    g = grad if mistake == "the gradient is not un-magnified by R^-1" else grad @ inverse
    return g, U, inverse


def rite_clip(g, mistake):
    """Both gradients, set to 0 and clipped, and whether each was set to 0."""

    def norm(parts):
        return max(1.0, math.hypot(*(x.norm().item() for x in parts)))

    if mistake == CLIPPED_FIRST:
        g = [x / norm(g) for x in g]
    large = [x.square().mean().sqrt().item() > 1 for x in g]
    g = [0 * x if over else x for x, over in zip(g, large, strict=True)]
    if mistake == "each factor is clipped by its own norm":
        g = [x / norm([x]) for x in g]
    elif mistake not in ("not clipped", CLIPPED_FIRST):
        g = [x / norm(g) for x in g]
    return g, large


def rite_moments_(state, g, U, betas, mistake):
    """M and V of one factor move; the direction that M gives."""
    state["t"] += 1
    t, n = state["t"], 1 if mistake == "the second moment is not divided by n" else len(g)
    b1, b2 = betas
    if mistake != "beta1 and beta2 as they are, without bias correction":
        b1, b2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in betas)
    turn = U.T @ state["U"]
    turn = turn.T if mistake == "turned the other way, by P^T" else turn
    same = torch.eye(len(turn)).to(turn)
    of_V = same if mistake == "the second moment does not turn" else turn
    of_M = same if mistake == "the first moment does not turn" else turn
    V = state["V"] = (1 - b2) * g.T @ g / n + b2 * of_V @ state["V"] @ of_V.T
    state["U"] = U
    values, vectors = torch.linalg.eigh((V + V.T) / 2)
    values = values.clamp(min=0)
    sizes = values.sqrt() + 1e-6
    if mistake == "eps under the root":
        sizes = (values + 1e-6).sqrt()
    elif mistake == "the inverse of V in place of its root":
        sizes = values + 1e-6
    root = vectors / sizes @ vectors.T
    if mistake == "averaged before V^(-1/2), not after":
        state["M"] = (1 - b1) * g + b1 * state["M"] @ of_M.T
        return state["M"] @ root
    state["M"] = (1 - b1) * g @ root + b1 * state["M"] @ of_M.T
    return state["M"]


def rite_move_(Z, step, inverse, lr, decay, mistake):
    back = inverse.T
    if mistake == "the step by R^-1, not R^-T":
        back = inverse
    elif mistake == "the step is not magnified back by R^-T":
        back = torch.eye(len(inverse)).to(inverse)
    if mistake == "no weight decay":
        decay = 0
    elif mistake == "weight decay without the learning rate":
        decay = decay / lr
    moved = Z - lr * step @ back
    old = moved.clone() if mistake == "weight decay of the new value" else Z.clone()
    Z.copy_(moved - lr * decay * old)


@torch.no_grad()
def rite_steps(mistake, lora_A, lora_B, lora_alpha, gradients, adamw):
    """LoRA-RITE for a pair, with one mistake."""
    A, B, result = lora_A.clone(), lora_B.clone(), []
    r = len(A)
    s = 1.0 if mistake == NO_SCALE else lora_alpha / r
    states = [
        {"t": 0, "M": 0 * A.T, "V": A.new_zeros(r, r), "U": 0 * B},
        {"t": 0, "M": 0 * B, "V": A.new_zeros(r, r), "U": 0 * A.T},
    ]
    for G in gradients:
        parts = [
            rite_gradient(B, A.T, s * G.T @ B, mistake),
            rite_gradient(A.T, B, s * G @ A.T, mistake),
        ]
        g, large = rite_clip([part[0] for part in parts], mistake)
        skipped = [False, False]
        if mistake == "the whole step of a factor is skipped where its rms is above 1":
            skipped = large
        elif mistake == "the step of both is skipped where one rms is above 1":
            skipped = [any(large)] * 2
        elif mistake == WAITS:
            skipped = [not B.any(), not A.any()]
        for Z, own, (_, U, inverse), state, skip in zip(
            (A.T, B), g, parts, states, skipped, strict=True
        ):
            if not skip:
                step = rite_moments_(state, own, U, adamw["betas"], mistake)
                rite_move_(Z, step, inverse, adamw["lr"], adamw["weight_decay"], mistake)
        of_A, of_B = states
        now = {"lora_A": A, "lora_B": B}
        now["exp_avg_lora_A"] = of_A["U"] @ of_A["M"].T
        now["exp_avg_lora_B"] = of_B["M"] @ of_B["U"].T
        for name, state in zip(PAIR, states, strict=True):
            now[f"exp_avg_sq_{name}"] = state["U"] @ state["V"] @ state["U"].T
        result.append({k: v.clone() for k, v in now.items()})
    return result


def lora_rite(adamw, **given):
    given["adamw"] = {"eps": 1e-8, **adamw}
    for cause in RITE_MISTAKES:
        yield cause, call(rite_steps, cause, **given)
    yield "plain AdamW", call(adamw_steps, NO_MISTAKE, **given)


# ------------------------------------------------------------------------------------------ AdaLoRA


def adalora_schedule(total, target, warmup, final, steps):
    def schedule(power=3, early=0, rounded=int, end=steps - warmup - final, t_f=final, way=None):
        result = []
        for t in range(1 - early, steps + 1 - early):
            share = max(0.0, 1 - (t - warmup) / end)
            share = way(share) if way else share**power
            b = rounded(target + (total - target) * share)
            b = total if t <= warmup else target if t >= steps - t_f else b
            result.append(b)
        return result

    yield "linear", call(schedule, power=1)
    yield "a square, not a cube", call(schedule, power=2)
    yield "1 - x^3 in place of (1 - x)^3", call(schedule, way=lambda share: 1 - (1 - share) ** 3)
    yield "rounded, not rounded down", call(schedule, rounded=round)
    yield "rounded up", call(schedule, rounded=math.ceil)
    yield "not rounded", call(schedule, rounded=float)
    yield "t counts from 0", call(schedule, early=1)
    yield "one step ahead", call(schedule, early=-1)
    yield "the cubic reaches the target at the last step", call(schedule, end=steps - warmup, t_f=0)
    yield "the cubic ends at T - t_i, and is cut at T - t_f", call(schedule, end=steps - warmup)
    yield (
        "the cubic starts at step 0",
        lambda: [
            total
            if t <= warmup
            else target
            if t >= steps - final
            else int(target + (total - target) * (1 - t / (steps - final)) ** 3)
            for t in range(1, steps + 1)
        ],
    )
    yield "the number that goes, not the number that stays", lambda: [total - b for b in schedule()]


def adalora_scores(weights, gradients):
    names = tuple(weights[0])

    def run(sensed=None, b1=0.85, b2=0.85, late=0, old=False, correct=False, first=False, of=None):
        sensed = sensed or (lambda w, g: (w * g).abs())
        zero = {k: torch.zeros_like(v) for k, v in weights[0].items()}
        sense, doubt = dict(zero), dict(zero)
        for t, found in enumerate(gradients):
            for k in names:
                now, before = sensed(weights[t + late][k], found[k]), sense[k]
                sense[k] = now if first and t == 0 else b1 * sense[k] + (1 - b1) * now
                about = before if old else sense[k]
                doubt[k] = b2 * doubt[k] + (1 - b2) * (now - about).abs()
        n = 1 - 0.85 ** len(gradients) if correct else 1
        sense, doubt = ({k: v / n for k, v in part.items()} for part in (sense, doubt))
        s = of(sense, doubt) if of else {k: sense[k] * doubt[k] for k in names}
        return {"scores": triplets(s), "sensitivity": sense, "uncertainty": doubt}

    def triplets(s, a=torch.mean, e=1.0):
        return e * s["lora_E"][:, 0] + a(s["lora_A"], 1) + a(s["lora_B"], 0)

    def other(make):
        found = run()
        s = {k: found["sensitivity"][k] * found["uncertainty"][k] for k in names}
        return {**found, "scores": make(s)}

    yield "w of after the step with the gradient of before, as published", call(run, late=1)
    yield "no absolute value", call(run, lambda w, g: w * g)
    yield "the gradient alone, without the weight", call(run, lambda w, g: g.abs())
    yield "(w g)^2 in place of |w g|", call(run, lambda w, g: (w * g) ** 2)
    yield "the uncertainty is about the I of before", call(run, old=True)
    yield "0.15 of the old, 0.85 of the new", call(run, b1=0.15, b2=0.15)
    yield "0.95 for the uncertainty", call(run, b2=0.95)
    yield "bias correction", call(run, correct=True)
    yield "I starts as the first sensitivity", call(run, first=True)
    yield "the last sensitivity alone, not its mean", call(run, b1=0.0)
    yield "the score is the sensitivity alone", call(run, of=lambda s, d: s)
    yield "the score is the uncertainty alone", call(run, of=lambda s, d: d)
    yield "I + U in place of I U", call(run, of=lambda s, d: {k: s[k] + d[k] for k in s})
    yield "entries are summed, not averaged", call(other, lambda s: triplets(s, torch.sum))
    yield "the largest entry of A and of B", call(other, lambda s: triplets(s, torch.amax))
    yield "without E", call(other, lambda s: triplets(s, e=0.0))
    yield "E alone", call(other, lambda s: s["lora_E"][:, 0])
    yield "E, A and B are averaged, not added", call(other, lambda s: triplets(s) / 3)
    yield "shape (r, 1), not (r,)", call(other, lambda s: triplets(s)[:, None])


def adalora_penalty(pairs):
    n = len(pairs)

    def gradient(of=None, gamma=0.1, count=2 * n, turned=False, less=1.0):
        of = of or (lambda off: off.norm())
        leaves = [{k: p[k].clone().requires_grad_(True) for k in PAIR} for p in pairs]
        total = 0
        for leaf in leaves:
            for rows in (leaf["lora_A"], leaf["lora_B"].T):
                rows = rows.T if turned else rows
                total = total + of(rows @ rows.T - less * torch.eye(len(rows)).to(rows))
        flat = [leaf[k] for leaf in leaves for k in PAIR]
        found = iter(torch.autograd.grad(gamma / count * total, flat))
        return [{k: next(found) for k in PAIR} for _ in pairs]

    yield "the norm is squared, as in the paper", call(gradient, lambda off: off.square().sum())
    yield (
        "the norm is squared, and summed over A and B, as in the paper",
        call(gradient, lambda off: off.square().sum(), count=1),
    )
    yield "summed, not averaged", call(gradient, count=1)
    yield "averaged over modules, A and B are added", call(gradient, count=n)
    yield "0.5, as PEFT's default", call(gradient, gamma=0.5)
    yield "1, without the weight of the penalty", call(gradient, gamma=1.0)
    yield "without I", call(gradient, less=0.0)
    yield "A^T A and B B^T in place of A A^T and B^T B", call(gradient, turned=True)
    yield "the mean of the squared entries", call(gradient, lambda off: off.square().mean())
    yield "the sum of absolute values", call(gradient, lambda off: off.abs().sum())
    yield "downhill: the negative gradient", call(gradient, gamma=-0.1)


def adalora_keep(scores, budget):
    ranked = sorted(scores.values(), reverse=True)
    cut, above = ranked[budget - 1], ranked[budget]

    def each_module(count):
        modules = {}
        for name in scores:
            modules.setdefault(name.rpartition("/")[0], []).append(name)
        chosen = set()
        for names in modules.values():
            chosen |= set(sorted(names, key=lambda n: -scores[n])[: count(len(modules))])
        return chosen

    yield (
        "all ties at the cut are dropped (<= the k-th value), as published",
        lambda: {n for n, v in scores.items() if v > above},
    )
    yield (
        "all ties at the cut are kept (>= the cut)",
        lambda: {n for n, v in scores.items() if v >= cut},
    )
    if len(set(scores.values())) == len(scores):
        yield "the worst are kept", lambda: set(sorted(scores, key=scores.get)[:budget])
        yield "what goes, not what stays", lambda: set(sorted(scores, key=scores.get)[:-budget])
        yield "in the order given, not by score", lambda: set([*scores][:budget])
        mean = sum(scores.values()) / len(scores)
        yield "all above the mean score", lambda: {n for n, v in scores.items() if v > mean}
        yield "each module keeps as many", call(each_module, lambda modules: budget // modules)
        yield (
            "each module keeps as many, rounded up",
            call(each_module, lambda modules: -(-budget // modules)),
        )
    best = sorted(scores, key=lambda n: -scores[n])
    modules = len({name.rpartition("/")[0] for name in scores})
    whole = budget - budget % modules
    yield "the budget is rounded down to whole ranks of all modules", lambda: set(best[:whole])
    yield "one too few", lambda: set(best[: budget - 1])
    yield "one too many", lambda: set(best[: budget + 1])


# -------------------------------------------------------------------------------------------- ALoRA


@torch.no_grad()
def loss_with(layers, batches, kept, base=True, rescaled=False, by_batch=False):
    """L with those ranks (layer, k) alone; None: all.

    Args:
        base: with the frozen weights. rescaled: by the ranks that are left. by_batch: the mean over
            batches.
    """
    made = []
    for i, layer in enumerate(layers):
        ks = [k for k in range(len(layer["lora_A"])) if kept is None or (i, k) in kept]
        r = len(ks) if rescaled and ks else len(layer["lora_A"])
        change = layer["lora_alpha"] / r * layer["lora_B"][:, ks] @ layer["lora_A"][ks]
        weight = base * layer["weight"] + change
        made.append({**layer, "weight": weight, "lora_B": 0 * layer["lora_B"]})
    model = Network(made)
    sizes = [len(batch["labels"]) for batch in batches]
    shares = [1 / len(sizes)] * len(sizes) if by_batch else [n / sum(sizes) for n in sizes]
    return sum(n * model(**b).loss.item() for n, b in zip(shares, batches, strict=True))


def alora_importance(layers, batches):
    ranks = [(i, k) for i, layer in enumerate(layers) for k in range(len(layer["lora_A"]))]

    def importance(of, own_layer=False, batches=batches, **how):
        loss = call(loss_with, layers, batches)
        whole, found = loss(None, **how), [[] for _ in layers]
        for i, k in ranks:
            without = loss([o for o in ranks if o != (i, k)], **how)
            others = [o for o in ranks if o[0] != i] if own_layer else []
            alone = loss([(i, k), *others], **how)
            found[i].append(of(whole, without, alone))
        return found

    def right(whole, without, alone):
        return without - whole - alone

    yield (
        "the rank alone is left out: S(M) - S(M without k)",
        call(importance, lambda whole, without, alone: without - whole),
    )
    yield (
        "the rank alone is subtracted",
        call(importance, lambda whole, without, alone: without - whole + alone),
    )
    yield "S = +loss", call(importance, lambda *losses: -right(*losses))
    yield "the rank alone is all that counts", call(importance, lambda w, o, alone: -alone)
    yield "S(M) is left out", call(importance, lambda whole, without, alone: without - alone)
    yield (
        "S(M without k) is added",
        call(importance, lambda whole, without, alone: -whole - without - alone),
    )
    yield (
        "alone among the ranks of its layer, the other layers keep theirs",
        call(importance, right, own_layer=True),
    )
    yield "the scale follows the ranks that are left", call(importance, right, rescaled=True)
    yield "the mean over batches, not over examples", call(importance, right, by_batch=True)
    yield "the first batch alone", call(importance, right, batches=batches[:1])
    yield "the last batch alone", call(importance, right, batches=batches[-1:])
    yield "the frozen weights are left out", call(importance, right, base=False)
    yield "one list for all layers", lambda: list(itertools.chain.from_iterable(importance(right)))


def alora_exchange(importance, places, on):
    order, modules = list(importance), len(places)

    def exchanged(key=importance.get, grow=NO_MISTAKE, mean=None, count=modules):
        worst = sorted(order, key=key)[:count]
        losers = {name.rpartition("/")[0] for name in worst}
        values = {m: [v for n, v in importance.items() if n.rpartition("/")[0] == m] for m in on}
        mean = mean or (lambda m: sum(values[m]) / len(values[m]))
        winners = [m for m in sorted(on) if m not in losers or grow == "all"]
        winners.sort(key=lambda m: -mean(m))
        winners = winners[::-1] if grow == "reversed" else winners
        winners = winners[:1] if grow == "best" else winners
        grown, left = dict.fromkeys(winners, 0), len(worst)

        def room(m):
            return grow == "overfull" or on[m] + grown[m] < places[m]

        while left and any(map(room, winners)):
            for m in winners:
                while left and room(m):
                    grown[m], left = grown[m] + 1, left - 1
                    if grow != "fill first":
                        break
            if grow == "overfull" and not winners:
                break
        kept = worst if grow == "not limited" else worst[: len(worst) - left]
        return {"pruned": sorted(kept), "grown": {m: n for m, n in grown.items() if n}}

    def last_first():
        order.reverse()
        try:
            return exchanged()
        finally:
            order.reverse()

    def total(m):
        return sum(v for n, v in importance.items() if n.rpartition("/")[0] == m)

    def largest(m):
        return max(v for n, v in importance.items() if n.rpartition("/")[0] == m)

    yield "the most important are pruned", call(exchanged, lambda n: -importance[n])
    yield "pruned by |importance|", call(exchanged, lambda n: abs(importance[n]))
    yield "of equal ranks the last one goes", last_first
    yield "ranks go to the least important modules first", call(exchanged, grow="reversed")
    yield "modules that lost a rank get new ones, too", call(exchanged, grow="all")
    yield "all new ranks go to the most important module", call(exchanged, grow="best")
    yield "one module after the other is filled, not one each", call(exchanged, grow="fill first")
    yield "a full module grows on", call(exchanged, grow="overfull")
    yield "more is pruned than can grow", call(exchanged, grow="not limited")
    yield "one rank too many goes", call(exchanged, count=modules + 1)
    yield "one rank too few goes", call(exchanged, count=modules - 1)
    yield "a rank of each module goes", lambda: each_module(importance, places)
    yield "the sum of importance, not its mean", call(exchanged, mean=total)
    yield "the largest importance, not the mean", call(exchanged, mean=largest)


def each_module(importance, places):
    worst = []
    for module in places:
        own = [n for n in importance if n.rpartition("/")[0] == module]
        worst.append(min(own, key=importance.get))
    return {"pruned": sorted(worst), "grown": dict.fromkeys(places, 1)}
