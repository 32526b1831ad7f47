"""The relatives' part of dense_candidate.py: gradients by hand, brute force, other decompositions.

    adapters     backpropagation by hand: G = dL/dy^T x, and a sum for each factor
    rules        AdamW written out; LoRA-Pro as a least squares problem of all r (m + n) unknowns;
                 LoRA-RITE in the space of the weight, without a basis (the order of its moments and
                 clips is that of its Algorithm 1, which test_rite_as_published holds against the
                 authors' numbers)
    budgets      loops over triplets, ranks and places

No line is shared with relatives/ or with tools/oracle/.
"""

import itertools
import math

import torch


def adamw_(p, g, state, lr, weight_decay, betas, eps):
    """AdamW (arXiv 1711.05101, Algorithm 2) written out: a new p; state is [t, m, v]."""
    (b1, b2), (t, m, v) = betas, state
    t, m, v = t + 1, b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    state[:] = t, m, v
    step = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + eps)
    return p - lr * weight_decay * p - lr * step


# ---------------------------------------------------------------------------------------- one layer


def linear(x, weight, bias, change, grad):
    """(y, dL/dx, G) of y = (W + change) x + b."""
    whole = weight + change
    y = torch.einsum("oi,ni->no", whole, x) + bias
    return y, torch.einsum("no,oi->ni", grad, whole), torch.einsum("no,ni->oi", grad, x)


def dora(x, weight, bias, lora_A, lora_B, lora_magnitude, lora_alpha, grad):
    """Output by output."""
    s, n_out = lora_alpha / lora_A.shape[0], len(weight)
    found = {"lora_A": 0 * lora_A, "lora_B": 0 * lora_B, "x": 0 * x}
    y, of_m = torch.empty_like(grad), torch.empty_like(lora_magnitude)
    for o in range(n_out):
        row = weight[o] + s * sum(lora_B[o, k] * lora_A[k] for k in range(len(lora_A)))
        length = math.sqrt(sum(v.item() ** 2 for v in row))
        y[:, o] = lora_magnitude[o] / length * (x @ row) + bias[o]
        of_m[o] = (grad[:, o] * (x @ row)).sum() / length
        of_row = (
            lora_magnitude[o] / length * (grad[:, o, None] * x).sum(0)
        )  # the length is constant
        found["x"] += grad[:, o, None] * row * lora_magnitude[o] / length
        found["lora_B"][o] = s * lora_A @ of_row
        found["lora_A"] += s * torch.outer(lora_B[o], of_row)
    return {"y": y, **found, "lora_magnitude": of_m}


def asymmetry(x, weight, bias, lora_A, lora_B, lora_alpha, grad):
    s = lora_alpha / lora_A.shape[0]
    y, of_x, G = linear(x, weight, bias, s * torch.einsum("or,ri->oi", lora_B, lora_A), grad)
    return {"y": y, "x": of_x, "lora_B": s * torch.einsum("oi,ri->or", G, lora_A)}


def lora_xs(x, weight, bias, lora_R, lora_alpha, grad):
    """Singular vectors from the eigenvectors of W^T W; R entry by entry."""
    s, r = lora_alpha / len(lora_R), len(lora_R)
    V = torch.linalg.eigh(weight.T @ weight)[1].flip(1)[:, :r]
    SV = []
    for k in range(r):
        u = weight @ V[:, k]  # sigma u
        sign = 1 if u[u.abs().argmax()] > 0 else -1
        SV.append((sign * u / u.norm(), sign * u.norm() * V[:, k]))
    change = sum(
        s * lora_R[j, k] * torch.outer(SV[j][0], SV[k][1]) for j in range(r) for k in range(r)
    )
    y, of_x, G = linear(x, weight, bias, change, grad)
    of_R = [torch.stack([s * SV[j][0] @ G @ SV[k][1] for k in range(r)]) for j in range(r)]
    return {"y": y, "x": of_x, "lora_R": torch.stack(of_R)}


def prolora(
    x,
    weight,
    bias,
    lora_A_shared,
    lora_A_own,
    lora_B_shared,
    lora_B_own,
    x_A,
    x_B,
    lora_alpha,
    grad,
):
    """Every entry of A and B looks up where it comes from; gradients are added up there."""
    shared, (width, height) = len(lora_A_shared), (lora_A_shared.shape[1], len(lora_B_shared))
    r = shared + len(lora_A_own)
    steps = max(1, shared // x_A), max(1, shared // x_B)

    def row_A(k, i):
        return (k + i // width * steps[0]) % shared, i % width

    def row_B(o, k):
        return o % height, (k + o // height * steps[1]) % shared

    A, B = weight.new_empty(r, weight.shape[1]), weight.new_empty(len(weight), r)
    A[shared:], B[:, shared:] = lora_A_own, lora_B_own
    for k in range(shared):
        for i in range(weight.shape[1]):
            A[k, i] = lora_A_shared[row_A(k, i)]
        for o in range(len(weight)):
            B[o, k] = lora_B_shared[row_B(o, k)]
    s = lora_alpha / r
    y, of_x, G = linear(x, weight, bias, s * torch.einsum("or,ri->oi", B, A), grad)
    of_A, of_B = s * torch.einsum("or,oi->ri", B, G), s * torch.einsum("oi,ri->or", G, A)
    found = {"lora_A_shared": 0 * lora_A_shared, "lora_B_shared": 0 * lora_B_shared}
    for k in range(shared):
        for i in range(weight.shape[1]):
            found["lora_A_shared"][row_A(k, i)] += of_A[k, i]
        for o in range(len(weight)):
            found["lora_B_shared"][row_B(o, k)] += of_B[o, k]
    found |= {"lora_A_own": of_A[shared:], "lora_B_own": of_B[:, shared:]}
    return {"y": y, "x": of_x, **found}


def sbora_fa(x, weight, bias, index, lora_B, lora_alpha, grad):
    """With the rows of the identity written out."""
    A = torch.zeros(len(index), weight.shape[1]).to(weight)
    for k, i in enumerate(index):
        A[k, i] = 1
    found = asymmetry(x, weight, bias, A, lora_B, lora_alpha, grad)
    return {k: found[k] for k in ("y", "x", "lora_B")}


def sbora_fb(x, weight, bias, index, lora_A, lora_alpha, grad):
    s, change = lora_alpha / len(index), 0 * weight
    for k, o in enumerate(index):
        change[o] += s * lora_A[k]
    y, of_x, G = linear(x, weight, bias, change, grad)
    return {"y": y, "x": of_x, "lora_A": torch.stack([s * G[o] for o in index])}


def adalora(x, weight, bias, lora_A, lora_E, lora_B, lora_alpha, grad):
    """Triplet by triplet."""
    s, r = lora_alpha / len(lora_A), range(len(lora_A))
    change = sum(s * lora_E[k, 0] * torch.outer(lora_B[:, k], lora_A[k]) for k in r)
    y, of_x, G = linear(x, weight, bias, change, grad)
    of_A = torch.stack([s * lora_E[k, 0] * lora_B[:, k] @ G for k in r])
    of_B = torch.stack([s * lora_E[k, 0] * G @ lora_A[k] for k in r], 1)
    of_E = torch.stack([s * (lora_B[:, k] @ G @ lora_A[k])[None] for k in r])
    return {"y": y, "x": of_x, "lora_A": of_A, "lora_E": of_E, "lora_B": of_B}


# ---------------------------------------------------------------------- one place in several blocks


def outputs(blocks, changes):
    """{"y", "x": lists}, [G] of blocks with those changes of their weights."""
    made = [
        linear(o["x"], o["weight"], 0, change, o["grad"])
        for o, change in zip(blocks, changes, strict=True)
    ]
    y, of_x, G = (list(part) for part in zip(*made, strict=True))
    return {"y": y, "x": of_x}, G


def tied(blocks, lora_A, lora_B, lora_alpha):
    s = lora_alpha / lora_A.shape[0]
    changes = [
        s * torch.einsum("o,or,r,ri->oi", o["lora_v"], lora_B, o["lora_u"], lora_A) for o in blocks
    ]
    found, gradients = outputs(blocks, changes)
    found |= {"lora_A": 0 * lora_A, "lora_B": 0 * lora_B, "lora_u": [], "lora_v": []}
    for o, G in zip(blocks, gradients, strict=True):
        u, v = o["lora_u"], o["lora_v"]
        found["lora_A"] += s * torch.einsum("o,or,r,oi->ri", v, lora_B, u, G)
        found["lora_B"] += s * torch.einsum("o,oi,r,ri->or", v, G, u, lora_A)
        found["lora_u"].append(s * torch.einsum("o,or,ri,oi->r", v, lora_B, lora_A, G))
        found["lora_v"].append(s * torch.einsum("or,r,ri,oi->o", lora_B, u, lora_A, G))
    return found


def condlora(blocks, lora_A, lora_B, lora_alpha):
    s = lora_alpha / lora_A.shape[0]
    core = torch.einsum("ar,rb->ab", lora_B, lora_A)  # Theta_B Theta_A
    changes = [s * torch.einsum("oa,ab,ib->oi", o["weight"], core, o["weight"]) for o in blocks]
    found, gradients = outputs(blocks, changes)
    of_core = sum(
        s * torch.einsum("oa,oi,ib->ab", o["weight"], G, o["weight"])
        for o, G in zip(blocks, gradients, strict=True)
    )
    of_A, of_B = lora_B.T @ of_core, of_core @ lora_A.T
    return {**found, "lora_A": of_A, "lora_B": of_B}


def cora(x, weights, lora_A, lora_alpha, grads):
    """U from the eigenvectors of the sum of W W^T."""
    r = len(lora_A[0])
    s, vectors = lora_alpha / r, torch.linalg.eigh(sum(w @ w.T for w in weights))[1]
    columns = [vectors[:, -1 - k] for k in range(r)]
    U = torch.stack([u if u[u.abs().argmax()] > 0 else -u for u in columns], 1)
    blocks = [{"x": x, "weight": w, "grad": g} for w, g in zip(weights, grads, strict=True)]
    found, gradients = outputs(blocks, [s * U @ a for a in lora_A])
    of_A = [s * torch.einsum("or,oi->ri", U, G) for G in gradients]
    return {"y": found["y"], "x": sum(found["x"]), "lora_A": of_A, "common": U}


def reslora(kind, blocks, pre, lora_alpha):
    """A sum over paths: block n takes by path (A of a, B of b, on the x of i)."""
    s = lora_alpha / len(blocks[0]["lora_A"])
    found, _ = outputs(blocks, [0] * len(blocks))
    found |= {k: [0 * o[k] for o in blocks] for k in ("lora_A", "lora_B")}
    for n, k in itertools.product(range(len(blocks)), range(pre + 1)):
        m = n - k
        if m < 0:
            continue
        a, b, i = {"input": (n, n, m), "block": (m, m, n), "middle": (m, n, m)}[kind]
        A, B, x, grad = blocks[a]["lora_A"], blocks[b]["lora_B"], blocks[i]["x"], blocks[n]["grad"]
        found["y"][n] = found["y"][n] + s * x @ (B @ A).T
        found["x"][i] = found["x"][i] + s * grad @ B @ A
        found["lora_A"][a] += s * torch.einsum("or,no,ni->ri", B, grad, x)
        found["lora_B"][b] += s * torch.einsum("no,ni,ri->or", grad, x, A)
    return found


def weight_change(method, given):
    """The output for the identity in place of x, without bias, less W."""

    def asked(weight):
        x = torch.eye(weight.shape[1]).to(weight)
        return {"x": x, "grad": x.new_zeros(len(x), len(weight))}

    function = globals()[method]
    if method == "cora":
        one = asked(given["weights"][0])
        outs = function(x=one["x"], grads=[one["grad"]] * 3, **given)["y"]
        return [y.T - w for y, w in zip(outs, given["weights"], strict=True)]
    if "blocks" in given:
        blocks = [{**o, **asked(o["weight"])} for o in given["blocks"]]
        outs = function(**{**given, "blocks": blocks})["y"]
        return [y.T - o["weight"] for y, o in zip(outs, blocks, strict=True)]
    weight = given["weight"]
    return function(bias=weight.new_zeros(len(weight)), **asked(weight), **given)["y"].T - weight


# -------------------------------------------------------------------------------------------- rules


def steps_with(rule, lora_A, lora_B, lora_alpha, gradients, settings):
    """AdamW on rule(A, B, G, s) = gradients of A, B; settings: of A and of B."""
    p = {"lora_A": lora_A, "lora_B": lora_B}
    states, result = {k: [0, 0 * q, 0 * q] for k, q in p.items()}, []
    for G in gradients:
        found = rule(p["lora_A"], p["lora_B"], G, lora_alpha / lora_A.shape[0])
        p = {
            k: adamw_(p[k], g, states[k], **own)
            for k, g, own in zip(p, found, settings, strict=True)
        }
        moments = {f"exp_avg_{k}": states[k][1] for k in p}
        result.append({**p, **moments, **{f"exp_avg_sq_{k}": states[k][2] for k in p}})
    return result


def plain(A, B, G, s):
    return s * torch.einsum("or,oi->ri", B, G), s * torch.einsum("oi,ri->or", G, A)


def loraplus(lora_A, lora_B, lora_alpha, gradients, adamw, ratio):
    fast = {**adamw, "lr": ratio * adamw["lr"]}
    return steps_with(plain, lora_A, lora_B, lora_alpha, gradients, (adamw, fast))


def preconditioned(A, B, gA, gB, delta):
    """(B^T B + delta I)^-1 gA by Cholesky's decomposition, and likewise for B."""
    eye = torch.eye(len(A)).to(A)
    cholesky = [torch.linalg.cholesky(m + delta * eye) for m in (B.T @ B, A @ A.T)]
    return torch.cholesky_solve(gA, cholesky[0]), torch.cholesky_solve(gB.T, cholesky[1]).T


def riemannian(lora_A, lora_B, lora_alpha, gradients, adamw, delta):
    def rule(A, B, G, s):
        return preconditioned(A, B, *plain(A, B, G, s), delta)

    return steps_with(rule, lora_A, lora_B, lora_alpha, gradients, (adamw, adamw))


def riemannian_step(lora_A, lora_B, gradient, lora_alpha, lr, delta):
    s = lora_alpha / lora_A.shape[0]
    pair = preconditioned(lora_A, lora_B, *plain(lora_A, lora_B, gradient, s), delta)
    A, B = lora_A - lr * pair[0], lora_B - lr * pair[1]
    return {"lora_A": A, "lora_B": B, "product": torch.einsum("or,ri->oi", s * B, A)}


def lora_pro(lora_A, lora_B, lora_alpha, gradients, adamw):
    """Of all pairs of gradients with the least ||s B a + s b A - G||, the one nearest to gA, gB."""

    def rule(A, B, G, s):
        dtype, (A, B, G) = A.dtype, (x.double() for x in (A, B, G))
        gA, gB = plain(A, B, G, s)
        of_a = s * torch.einsum("or,ij->oirj", B, torch.eye(A.shape[1]).to(A))
        of_b = s * torch.einsum("op,ri->oipr", torch.eye(len(B)).to(A), A)
        matrix = torch.cat([of_a.flatten(0, 1).flatten(1), of_b.flatten(0, 1).flatten(1)], 1)
        left = G - s * B @ gA - s * gB @ A
        moved = torch.linalg.pinv(matrix, rtol=1e-10) @ left.flatten()  # the shortest solution
        moved = moved * (moved.abs() > 1e-12)  # AdamW would make a step of a rounding error
        new_A, new_B = gA + moved[: A.numel()].view_as(A), gB + moved[A.numel() :].view_as(B)
        return new_A.to(dtype), new_B.to(dtype)

    return steps_with(rule, lora_A, lora_B, lora_alpha, gradients, (adamw, adamw))


def lora_rite(lora_A, lora_B, lora_alpha, gradients, adamw):
    """In the space of the weight: the basis U is never chosen, only P = U U^T and X = g U^T.

    With Y = U R the un-magnified gradient is s G U, and X = s G P; V becomes W = U V U^T, M becomes
    N = M U^T, a turn is a multiplication by P, and Z moves by N Y (Y^T Y)^-1.
    """
    s, (b1, b2) = lora_alpha / lora_A.shape[0], adamw["betas"]
    Z = {"lora_A": lora_A.T.double(), "lora_B": lora_B.double()}
    N = {k: 0 * (Z["lora_A"] @ Z["lora_B"].T) for k in Z}
    N["lora_B"] = N["lora_B"].T
    W = {k: n.T @ n for k, n in N.items()}
    result = []
    for t, G in enumerate(gradients, 1):
        G = G.double()
        Y = {"lora_A": Z["lora_B"], "lora_B": Z["lora_A"]}
        back = {k: torch.linalg.pinv(y, rtol=1e-10).T for k, y in Y.items()}  # Y (Y^T Y)^-1
        P = {k: Y[k] @ back[k].T for k in Y}
        X = {"lora_A": s * G.T @ P["lora_A"], "lora_B": s * G @ P["lora_B"]}
        for k, x in X.items():
            if math.sqrt((x**2).sum() / (len(x) * len(lora_A))) > 1:
                X[k] = 0 * x
        size = math.sqrt(sum((x**2).sum() for x in X.values()))
        d1, d2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in (b1, b2))
        for k in X:
            x = X[k] / max(1, size)
            W[k] = (1 - d2) * x.T @ x / len(x) + d2 * P[k] @ W[k] @ P[k]
            values, vectors = torch.linalg.eigh((W[k] + W[k].T) / 2)
            root = vectors / (values.clamp(min=0).sqrt() + 1e-6) @ vectors.T @ P[k]
            N[k] = (1 - d1) * x @ root + d1 * N[k] @ P[k]
        moves = {k: N[k] @ back[k] + adamw["weight_decay"] * Z[k] for k in Z}
        Z = {k: Z[k] - adamw["lr"] * moves[k] for k in Z}
        first = {"exp_avg_lora_A": N["lora_A"].T, "exp_avg_lora_B": N["lora_B"]}
        second = {f"exp_avg_sq_{k}": W[k] for k in W}
        result.append({"lora_A": Z["lora_A"].T, "lora_B": Z["lora_B"], **first, **second})
    return result


# ------------------------------------------------------------------------------------------ budgets


def adalora_schedule(total, target, warmup, final, steps):
    """In whole numbers."""
    result, span = [], steps - warmup - final
    for t in range(1, steps + 1):
        left = min(max(span - (t - warmup), 0), span)
        result.append((target * span**3 + (total - target) * left**3) // span**3)
    return result


def adalora_scores(weights, gradients):
    """Moving averages as sums over all steps."""
    T, names = len(gradients), list(weights[0])
    share = [0.15 * 0.85 ** (T - 1 - t) for t in range(T)]
    now = [
        {k: (w[k] * g[k]).abs() for k in names} for w, g in zip(weights, gradients, strict=False)
    ]

    def sensitivity(k, until):
        return sum(0.15 * 0.85 ** (until - t) * now[t][k] for t in range(until + 1))

    sense = {k: sensitivity(k, T - 1) for k in names}
    doubt = {
        k: sum(share[t] * (now[t][k] - sensitivity(k, t)).abs() for t in range(T)) for k in names
    }
    s = {k: sense[k] * doubt[k] for k in names}
    n, m = s["lora_A"].shape[1], s["lora_B"].shape[0]
    scores = [
        s["lora_E"][k, 0] + sum(s["lora_A"][k]) / n + sum(s["lora_B"][:, k]) / m
        for k in range(len(s["lora_A"]))
    ]
    return {"scores": torch.stack(scores), "sensitivity": sense, "uncertainty": doubt}


def adalora_penalty(pairs):
    """The slope of the norm of A A^T - I is 2 (A A^T - I) A over that norm, entry by entry."""

    def slope(A):
        off = A.new_zeros(len(A), len(A))
        for i, j in itertools.product(range(len(A)), repeat=2):
            off[i, j] = A[i] @ A[j] - int(i == j)
        return 0.1 / (2 * len(pairs)) * 2 * off @ A / math.sqrt((off**2).sum())

    return [{"lora_A": slope(p["lora_A"]), "lora_B": slope(p["lora_B"].T).T} for p in pairs]


def adalora_keep(scores, budget):
    """The best one that is left, budget times."""
    chosen = []
    for _ in range(budget):
        chosen.append(max((n for n in scores if n not in chosen), key=scores.get))
    return chosen


def alora_importance(layers, batches):
    """Dense matrices; what is left out is subtracted from the whole."""
    x, labels = (torch.cat([batch[k] for batch in batches]) for k in ("x", "labels"))

    def loss(weights):
        h = x
        for i, w in enumerate(weights):
            h = h @ w.T if i == len(weights) - 1 else (h @ w.T).clamp(min=0)
        return -h.log_softmax(1)[range(len(h)), labels].mean().item()

    parts = [
        [
            o["lora_alpha"] / o["lora_A"].shape[0] * torch.outer(o["lora_B"][:, k], o["lora_A"][k])
            for k in range(len(o["lora_A"]))
        ]
        for o in layers
    ]
    bare = [o["weight"] for o in layers]
    whole = [w + sum(own) for w, own in zip(bare, parts, strict=True)]

    def changed(weights, i, by):
        return [w + by if j == i else w for j, w in enumerate(weights)]

    return [
        [
            -loss(whole) + loss(changed(whole, i, -part)) - loss(changed(bare, i, part))
            for part in own
        ]
        for i, own in enumerate(parts)
    ]


def alora_exchange(importance, places, on):
    """One rank after the other."""
    pruned, queue = [], dict(importance)
    while len(pruned) < len(places):
        pruned.append(min(queue, key=queue.get))
        del queue[pruned[-1]]
    lost = {name.split("/")[0] for name in pruned}
    means = {
        m: math.fsum(v for n, v in importance.items() if n.split("/")[0] == m) / on[m]
        for m in on
        if m not in lost
    }
    room = {m: places[m] - on[m] for m in sorted(means, key=means.get, reverse=True)}
    grown = []
    for round_ in range(max(room.values())):
        grown += [m for m in room if room[m] > round_]
    grown = grown[: len(pruned)]
    return {
        "pruned": sorted(pruned[: len(grown)]),
        "grown": {m: grown.count(m) for m in room if m in grown},
    }
