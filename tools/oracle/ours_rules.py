"""The interface of the oracle, of optimizer rules and rank budgets, with this repository's answers.

    rules      loraplus, riemannian, riemannian_step, lora_pro, lora_rite
    budgets    adalora_schedule, adalora_scores, adalora_penalty, adalora_keep; alora_importance,
               alora_exchange

It is a part of ours.py, whose introduction holds for it.

What this file does not do: have a loss (dL/dW is given), draw the A of new ranks.
"""

import torch

import lora
from relatives import METHODS, lora_plus, plain
from relatives import riemannian as riemannian_rule
from relatives.adalora import AdaLoRA, budget
from relatives.exchange import exchange, importance
from relatives.triplets import AdaLoRALayer, add_penalty
from tools.oracle.network import Network, linear_of

# -------------------------------------------------------------------------------------------- rules


def one_pair(lora_A, lora_B, lora_alpha):
    """A network of one pair, beside a weight of zeros."""
    weight = lora_A.new_zeros(len(lora_B), lora_A.shape[1])
    pair = {"lora_A": lora_A, "lora_B": lora_B, "lora_alpha": lora_alpha}
    return Network([{"weight": weight, **pair}])


def steps_of(optimizer, model, gradients, adamw, read):
    """[{lora_A, lora_B, and what read(optimizer, factors) gives} after each step]."""
    for group in optimizer.param_groups:
        group.update({k: v for k, v in adamw.items() if k in ("betas", "eps")})
    (layer,) = lora.adapters(model).values()
    factors, result = layer.factors(), []
    for G in gradients:
        optimizer.zero_grad()
        (layer.delta_w() * G).sum().backward()  # dL/dΔW = G
        optimizer.step()
        state = {**factors, **read(optimizer, factors)}
        result.append({name: value.detach().clone() for name, value in state.items()})
    return result


def moments(optimizer, factors):
    return {
        f"{moment}_{name}": optimizer.state[factor][moment]
        for name, factor in factors.items()
        for moment in ("exp_avg", "exp_avg_sq")
    }


def rule_steps(make, lora_A, lora_B, lora_alpha, gradients, adamw, read=moments, **more):
    model = one_pair(lora_A, lora_B, lora_alpha)
    optimizer = make(model, adamw["lr"], adamw["weight_decay"], **more)
    return steps_of(optimizer, model, gradients, adamw, read)


def loraplus(lora_A, lora_B, lora_alpha, gradients, adamw, ratio):
    """LoRA+ (arXiv 2402.12354): AdamW for one pair, where B learns at ratio times the rate of A.

    Decay is decoupled and times the rate, so that B decays ratio times as fast, too.

    Args:
        gradients: list of G = dL/dW (out, in), one a step, wherever A and B have got to; so that
            gA = dL/dA = scaling B^T G and gB = dL/dB = scaling G A^T, with A and B of that step
            (what autograd gives for L = sum of G o (scaling B A)).
        adamw: lr, weight_decay, betas, eps, as of torch.optim.AdamW; lr is that of A.

    Returns:
        [for each step a dict: lora_A, lora_B as they are after it, and AdamW's moments
        exp_avg_lora_A, exp_avg_sq_lora_A, exp_avg_lora_B, exp_avg_sq_lora_B].
    """
    rule = lora_plus.optimizer
    return rule_steps(rule, lora_A, lora_B, lora_alpha, gradients, adamw, ratio=ratio)


def riemannian(lora_A, lora_B, lora_alpha, gradients, adamw, delta):
    """Riemannian preconditioning (arXiv 2402.02347): AdamW on other gradients; as loraplus.

    In each step gA <- (B^T B + delta I)^-1 gA and gB <- gB (A A^T + delta I)^-1, both with A and B
    of before the step; these go into the moments.

    Returns:
        as loraplus.
    """

    def rule(model, lr, weight_decay):
        def precondition(A, B, gA, gB, scaling):
            return riemannian_rule.precondition(A, B, gA, gB, scaling, delta)

        return plain.OtherGradients(model, lr, weight_decay, precondition)

    return rule_steps(rule, lora_A, lora_B, lora_alpha, gradients, adamw)


@torch.no_grad()
def riemannian_step(lora_A, lora_B, gradient, lora_alpha, lr, delta):
    """One step of plain gradient descent, preconditioned as in riemannian.

        A <- A - lr (B^T B + delta I)^-1 gA,     gA = scaling B^T G
        B <- B - lr gB (A A^T + delta I)^-1,     gB = scaling G A^T

    Args:
        gradient: G = dL/dW, (out, in). delta: number, may be 0.

    Returns:
        {"lora_A", "lora_B" after the step, "product": scaling B A of them}.
    """
    scaling = lora_alpha / len(lora_A)
    gA, gB = scaling * lora_B.T @ gradient, scaling * gradient @ lora_A.T
    new_A, new_B = riemannian_rule.precondition(lora_A, lora_B, gA, gB, scaling, delta)
    A, B = lora_A - lr * new_A, lora_B - lr * new_B
    return {"lora_A": A, "lora_B": B, "product": scaling * B @ A}


def lora_pro(lora_A, lora_B, lora_alpha, gradients, adamw):
    """LoRA-Pro (arXiv 2407.18242), with moments of the size of A and B; arguments as of loraplus.

    AdamW on the two gradients whose joint effect on the weight, s B gA' + s gB' A, comes nearest to
    G, and of those the two that are nearest to gA and gB:

        gA' = 1/s^2 (B^T B)^-1 gA + X A,             s = scaling
        gB' = 1/s^2 (I - P_B) gB (A A^T)^-1 - B X,   P_B = B (B^T B)^-1 B^T
        B^T B X + X A A^T = -1/s^2 (B^T B)^-1 gA A^T

    At B = 0, where gA is 0: gA' = 0 and gB' = 1/s^2 gB (A A^T)^-1. Steps are counted from 1.

    Returns:
        as loraplus.
    """
    rule = METHODS["optimizer"]["lora_pro"]
    return rule_steps(rule, lora_A, lora_B, lora_alpha, gradients, adamw)


def lora_rite(lora_A, lora_B, lora_alpha, gradients, adamw):
    """LoRA-RITE (arXiv 2410.20625): Adam that does not see the basis of the pair; as loraplus.

    For each factor Z, B or A^T, (n, r), with the other one Y, A^T or B, (m, r), at step t = 1, 2, …

        Y = U R                                 thin QR
        g = dL/dZ R^-1                          pseudo-inverse, where R has not full rank
        g = 0, if the root of the mean of g^2 is above 1
        both g <- g / max(1, ||(g of A, g of B)||)
        P = U^T (U of the step before)          0 in the first step
        b = beta (1 - beta^(t-1)) / (1 - beta^t), for beta1 and beta2
        V <- (1 - b2) g^T g / n + b2 P V P^T
        M <- (1 - b1) g V^(-1/2) + b1 M P^T     V^(-1/2): 1 / (sqrt(v) + 1e-6) of an eigenvalue v
        Z <- Z - lr (M R^-T + weight_decay Z)   the decay is not of the new Z

    g that was set to 0 counts as 0 in V and M, and M moves Z all the same.

    Args:
        adamw: lr, weight_decay, betas.

    Returns:
        [for each step a dict: lora_A, lora_B, and the moments, free of the signs that QR leaves
        open: exp_avg_lora_A: U M^T (out, in), exp_avg_lora_B: M U^T (out, in),
        exp_avg_sq_lora_A: U V U^T (out, out), exp_avg_sq_lora_B: U V U^T (in, in)].
    """

    def read(optimizer, factors):
        found = {}
        for name, factor in factors.items():
            state = optimizer.state[factor]
            U, M, V = (state[key] for key in ("basis", "exp_avg", "exp_avg_sq"))
            found[f"exp_avg_{name}"] = U @ M.T if name == "lora_A" else M @ U.T
            found[f"exp_avg_sq_{name}"] = U @ V @ U.T
        return found

    rule = METHODS["optimizer"]["lora_rite"]
    return rule_steps(rule, lora_A, lora_B, lora_alpha, gradients, adamw, read)


# ------------------------------------------------------------------------------------------ budgets


def adalora_model(modules):
    """(the allocator, its layers) of AdaLoRA; modules: list of (out, in, r, dtype)."""
    layers = []
    for outer, inner, r, dtype in modules:
        base = linear_of(torch.zeros(outer, inner, dtype=dtype))
        layers.append(AdaLoRALayer(base, inner, outer, r, r))
    allocator = AdaLoRA(Network(layers), steps=2, interval=1, keep=1.0)
    return allocator, layers


def adalora_schedule(total, target, warmup, final, steps):
    """AdaLoRA's budget: how many triplets stay after step t, for t = 1 … steps.

        b(t) = total                                                  up to t = warmup
        b(t) = target + (total - target) (1 - (t - warmup) / (steps - warmup - final))^3
        b(t) = target                                                 from t = steps - final on

    rounded down (arXiv 2303.10512, appendix A, as its published code has it).

    Returns:
        [b(1), …, b(steps)], integers.
    """
    return [budget(t, total, target, warmup, steps - final) for t in range(1, steps + 1)]


def adalora_scores(weights, gradients):
    """AdaLoRA's scores of the r triplets of one module, after some steps (arXiv 2303.10512, 3.2).

    For each step and each entry w of E, A, B with its gradient, I = U = 0 at first:

        c = |w dL/dw|                  w and dL/dw both of before the step
        I <- 0.85 I + 0.15 c
        U <- 0.85 U + 0.15 |c - I|     with the new I
        S_k = s(E_k) + mean_j s(A_kj) + mean_i s(B_ik),   s = I U

    Args:
        weights: [{"lora_A" (r, in), "lora_E" (r, 1), "lora_B" (out, r)} before step 1, 2, … T, and
            after step T]: one more than steps.
        gradients: [{…} of step 1, … T], of all that the loss holds.

    Returns:
        {"scores": (r,), "sensitivity": {I of "lora_A", "lora_E", "lora_B"}, "uncertainty": {U}}.
    """
    first = weights[0]["lora_A"]
    shape = len(weights[0]["lora_B"]), first.shape[1], len(first), first.dtype
    allocator, (layer,) = adalora_model([shape])
    with torch.no_grad():
        for before, found in zip(weights, gradients, strict=False):
            for name, factor in layer.factors().items():
                factor.copy_(before[name])
                factor.grad = torch.zeros_like(factor)
            add_penalty([layer])
            for name, factor in layer.factors().items():
                factor.grad = found[name] - factor.grad  # before_step adds the penalty again
            allocator.before_step()
    parts = {"sensitivity": allocator.sensitivity, "uncertainty": allocator.uncertainty}
    (scores,) = allocator.scores().values()
    named = {k: {n.rpartition(".")[2]: v for n, v in part.items()} for k, part in parts.items()}
    return {"scores": scores.detach(), **named}


def adalora_penalty(pairs):
    """The gradient of what AdaLoRA adds to the loss, so that A and B stay near orthogonal.

    It is 0.1 times the mean over all A and B of all pairs of ||A A^T - I||_F and ||B^T B - I||_F:
    norms, not their squares, and a mean, not a sum (as in the published code).

    Args:
        pairs: list of {"lora_A" (r, in), "lora_B" (out, r)}.

    Returns:
        [{"lora_A", "lora_B": the gradients} of each pair].
    """
    shapes = [
        (len(p["lora_B"]), p["lora_A"].shape[1], len(p["lora_A"]), p["lora_A"].dtype) for p in pairs
    ]
    _, layers = adalora_model(shapes)
    with torch.no_grad():
        for layer, pair in zip(layers, pairs, strict=True):
            layer.lora_A.copy_(pair["lora_A"])
            layer.lora_B.copy_(pair["lora_B"])
            for factor in layer.factors().values():
                factor.grad = torch.zeros_like(factor)
    add_penalty(layers)
    return [{"lora_A": layer.lora_A.grad, "lora_B": layer.lora_B.grad} for layer in layers]


def adalora_keep(scores, budget):
    """Which triplets AdaLoRA keeps: the budget best ones of all modules together, exactly as many.

    Between equal scores any choice is right.

    Args:
        scores: dict "module/k" -> S_k >= 0, of rank k of a module; larger = keep. budget: int.

    Returns:
        set of names: those whose E is not set to 0.
    """
    ranks = {}
    for name in scores:
        ranks.setdefault(name.rpartition("/")[0], []).append(name)
    allocator, _ = adalora_model([(99, 99, len(names), torch.float64) for names in ranks.values()])
    given = {
        own: torch.tensor([float(scores[name]) for name in names], dtype=torch.float64)
        for own, names in zip(allocator.layers, ranks.values(), strict=True)
    }
    allocator.scores, allocator.target = lambda: given, budget
    allocator.after_step()
    kept = set()
    for own, names in zip(allocator.layers, ranks.values(), strict=True):
        kept |= {name for name, on in zip(names, allocator.mask[own][:, 0], strict=True) if on}
    return kept


def alora_importance(layers, batches):
    """ALoRA's importance of each rank (arXiv 2403.16187), on the small network.

        IS(k) = S(M) - S(M without k) + S(M with k alone),     S = -L

    M has all ranks of all layers. Without k: its row of A and column of B are left out. With k
    alone: all other ranks of all layers are left out, the frozen weights stay. A scaling is that of
    the whole pair in all three.

    Returns:
        [[IS of rank 0, 1, …] of each layer].
    """
    result = {}
    for (name, _), value in importance(Network(layers), batches).items():
        result.setdefault(name, []).append(value)
    return list(result.values())


def alora_exchange(importance, places, on):
    """Which ranks ALoRA prunes, and where new ones grow.

    n is the number of modules. The n ranks of the least importance are pruned, of equal ones the
    first in the order given. The modules that lost none get new ranks, one each in the order of
    the mean importance of the ranks that they have (0 if none), the largest first, round after
    round, until there are n; a module that is full is passed over. If all are full, only as many
    are pruned as could grow, the least important first.

    Args:
        importance: dict "module/k" -> number, of every rank that is on.
        places: dict module -> how many ranks it can hold. on: dict module -> how many it has.

    Returns:
        {"pruned": [names, sorted], "grown": {module: number of new ranks, above 0}}.
    """
    by_pair = {}
    for name, value in importance.items():
        module, _, k = name.rpartition("/")
        by_pair[module, int(k)] = value
    pruned, grown = exchange(by_pair, places, on)
    names = sorted(f"{module}/{k}" for module, k in pruned)
    return {"pruned": names, "grown": {name: n for name, n in grown.items() if n}}
