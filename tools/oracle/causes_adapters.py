"""What people get wrong: other forms of LoRA's branch; a part of causes.py.

Each method is written as the change of W that it makes, a function of its tensors, from which y and
all gradients follow (autograd). A function X_changes gives {cause: change}, with the right one
under NO_MISTAKE. Those in GRADIENT_ALONE have the value of another one, and a gradient of their
own.

What this file does not do: compute with relatives/ (ours_adapters.py does).
"""

import torch

from tools.oracle.mistakes import call, scales
from tools.oracle.network import differentiate
from tools.oracle.wrong_runs import NO_MISTAKE

NOT_DETACHED = "the norm is not detached: it gets a gradient"
WRONG_AXIS_TOO = "the norm is over the wrong axis, and not detached"
FIRST_COPY = "the gradient of a chunk is that of its first copy alone"
MEAN_OF_COPIES = "the gradient of a chunk is the mean over its copies"
LAST_BLOCK = "the gradient of what is shared is that of the last block alone"
MEAN_OF_BLOCKS = "the gradient of what is shared is the mean over the blocks"
HELD = "no gradient to the pairs of other blocks"
GRADIENT_ALONE = (
    *(NOT_DETACHED, WRONG_AXIS_TOO, FIRST_COPY, MEAN_OF_COPIES),
    *(LAST_BLOCK, MEAN_OF_BLOCKS, HELD),
)


def gradient_times(x, factor):
    """x, whose gradient is multiplied by a factor."""
    return factor * x + ((1 - factor) * x).detach()


# -------------------------------------------------------------------------- changes of W, one layer


def dora_changes(s, weight, lora_A, lora_B, lora_magnitude):
    m = lora_magnitude[:, None]
    v = weight + s * lora_B @ lora_A

    def over(norm, m=m, v=v):
        return m * v / norm - weight

    def rows(v):
        return v.norm(dim=1, keepdim=True)

    columns = v.norm(dim=0, keepdim=True)
    return {
        NO_MISTAKE: call(over, rows(v).detach()),
        NOT_DETACHED: call(over, rows(v)),
        "the norm is over the wrong axis: columns, not rows": call(over, columns.detach()),
        WRONG_AXIS_TOO: call(over, columns),
        "the magnitude and the norm go by columns": lambda: m.T * v / columns.detach() - weight,
        "one norm of the whole matrix": call(over, v.norm().detach()),
        "the norm is of W alone": call(over, rows(weight).detach()),
        "the norm is squared": call(over, (rows(v) ** 2).detach()),
        "the sum of absolute values is taken for the norm": call(
            over, v.abs().sum(1, keepdim=True).detach()
        ),
        "not divided by the norm": call(over, 1.0),
        "the magnitude is left out": call(over, rows(v).detach(), torch.ones_like(m)),
        "the magnitude is ||W||, as at the start": call(over, rows(v).detach(), rows(weight)),
        "the magnitude multiplies W + dW, W's own norm divides it away": lambda: (
            m / rows(weight) * weight + s * lora_B @ lora_A - weight
        ),
    }


def asymmetry_changes(s, weight, lora_A, lora_B):
    def orthonormal():
        return torch.linalg.qr(lora_B.detach())[0]

    return {
        NO_MISTAKE: lambda: s * lora_B @ lora_A,
        "B is orthonormal, too": lambda: s * (lora_B + orthonormal() - lora_B.detach()) @ lora_A,
        "A's rows are scaled by 1 / sqrt(in)": lambda: s * lora_B @ lora_A / lora_A.shape[1] ** 0.5,
    }


def lora_xs_changes(s, weight, lora_R):
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    sign = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
    U, Vh = (U * sign).to(weight), (Vh * sign.T).to(weight)
    S, r = S.to(weight), len(lora_R)
    u, v, first = U[:, :r], Vh[:r], S[:r]
    ends = U[:, -r:], S[-r:], Vh[-r:]
    other = Vh.gather(1, Vh.abs().argmax(1, keepdim=True)).sign()[:r]
    found = {
        NO_MISTAKE: lambda: s * u @ lora_R @ (first[:, None] * v),
        "without the singular values": lambda: s * u @ lora_R @ v,
        "the singular values are on U's side": lambda: s * (u * first) @ lora_R @ v,
        "the roots of the singular values are on both sides": lambda: (
            s * (u * first**0.5) @ lora_R @ (first[:, None] ** 0.5 * v)
        ),
        "the singular values are squared": lambda: s * u @ lora_R @ (first[:, None] ** 2 * v),
        "R is transposed": lambda: s * u @ lora_R.T @ (first[:, None] * v),
        "the largest entries of V are positive, not U's": lambda: (
            s * (u * other.T) @ lora_R @ (first[:, None] * v * other)
        ),
        "the largest entries of U are positive, and V does not go with them": lambda: (
            s * u @ lora_R @ (first[:, None] * v * sign.T[:r])
        ),
    }
    found["U and V are exchanged"] = lambda: s * v.T @ lora_R @ (first[:, None] * u.T)
    if r < len(S):
        found["the smallest singular values are taken"] = lambda: (
            s * ends[0] @ lora_R @ (ends[1][:, None] * ends[2])
        )
    return found


def repeated(chunk, x, shift, axis=0):
    return torch.cat([chunk.roll(-j * shift, axis) for j in range(x)], 1)


def prolora_changes(s, weight, lora_A_shared, lora_A_own, lora_B_shared, lora_B_own, x_A, x_B):
    shared = len(lora_A_shared)

    def change(copies=repeated, shift=lambda x: max(1, shared // x), s=s, chunks=None):
        a, b = chunks or (lora_A_shared, lora_B_shared)
        A = torch.cat([copies(a, x_A, shift(x_A)), lora_A_own])
        B = torch.cat([copies(b.T, x_B, shift(x_B)), lora_B_own.T]).T
        return s * B @ A

    def first_alone(chunk, x, shift):
        parts = [chunk, *(chunk.detach().roll(-j * shift, 0) for j in range(1, x))]
        return torch.cat(parts, 1)

    def mean(chunk, x, shift):
        return repeated(gradient_times(chunk, 1 / x), x, shift)

    def each_feature(chunk, x, shift):
        whole = repeated(chunk, x, shift)
        return whole.unflatten(1, (x, -1)).transpose(1, 2).flatten(1)

    r = shared + len(lora_A_own)
    return {
        NO_MISTAKE: change,
        "rolled along the features, not along the ranks": call(change, call(repeated, axis=1)),
        "rolled the other way": call(change, shift=lambda x: -max(1, shared // x)),
        "no rotation": call(change, shift=lambda x: 0),
        "copy j is rolled by j, not by j * shift": call(change, shift=lambda x: 1),
        "the shift may be 0: floor((r - u) / x) without max(1, …)": call(
            change, shift=lambda x: shared // x
        ),
        "the shift is x, not the ranks over x": call(change, shift=lambda x: x),
        "the shift counts all r ranks, not those that are shared": call(
            change, shift=lambda x: max(1, -(-r // x))
        ),
        "features are repeated one by one, not chunk by chunk": call(change, each_feature),
        "scale by the shared ranks, lora_alpha / (r - u)": call(change, s=s * r / shared),
        "the plain ranks are left out": lambda: (
            s
            * repeated(lora_B_shared.T, x_B, max(1, shared // x_B)).T
            @ repeated(lora_A_shared, x_A, max(1, shared // x_A))
        ),
        FIRST_COPY: call(change, first_alone),
        MEAN_OF_COPIES: call(change, mean),
    }


def sbora_fa_changes(s, weight, index, lora_B):
    inner = weight.shape[1]

    def at(index, B=lora_B):
        return torch.zeros_like(weight).index_add(1, index, s * B)

    rest = torch.tensor([i for i in range(inner) if i not in index.tolist()])[: len(index)]
    return {
        NO_MISTAKE: call(at, index),
        "the first r inputs are taken, not those of S": call(at, torch.arange(len(index))),
        "S is sorted first": call(at, index.sort().values),
        "S counts from 1": call(at, index - 1),
        "the inputs that are not in S are taken": call(at, rest),
        "the columns of W are replaced, not added to": lambda: (
            at(index) - torch.zeros_like(weight).index_add(1, index, weight[:, index])
        ),
    }


def sbora_fb_changes(s, weight, index, lora_A):
    outer = len(weight)

    def at(index):
        return torch.zeros_like(weight).index_add(0, index, s * lora_A)

    rest = torch.tensor([i for i in range(outer) if i not in index.tolist()])
    rest = torch.cat([rest, rest])[: len(index)]
    return {
        NO_MISTAKE: call(at, index),
        "the first r outputs are taken, not those of S": call(at, torch.arange(len(index))),
        "S is sorted first": call(at, index.sort().values),
        "S counts from 1": call(at, index - 1),
        "the outputs that are not in S are taken": call(at, rest),
        "the rows of W are replaced, not added to": lambda: (
            at(index) - torch.zeros_like(weight).index_add(0, index, weight[index])
        ),
    }


def adalora_changes(s, weight, lora_A, lora_E, lora_B):
    r, kept = len(lora_A), int((lora_E != 0).sum())
    return {
        NO_MISTAKE: lambda: s * lora_B @ (lora_E * lora_A),
        "scale lora_alpha / (r + 1e-5), as published": lambda: (
            s * r / (r + 1e-5) * lora_B @ (lora_E * lora_A)
        ),
        "scale by the ranks that are left, not by r": lambda: (
            s * r / kept * lora_B @ (lora_E * lora_A)
        ),
        "E is left out": lambda: s * lora_B @ lora_A,
        "E stands twice, with A and with B": lambda: s * lora_B @ (lora_E**2 * lora_A),
        "|E| in place of E": lambda: s * lora_B @ (lora_E.abs() * lora_A),
    }


# ---------------------------------------------------------------------------- changes of W, several


def of_blocks(blocks, name):
    return [block[name] for block in blocks]


def shared_of(change, blocks, pair):
    """What only the gradients of a shared pair show: {cause: changes}; change(pair, block)."""

    def with_gradients(factors):
        made = []
        for block, factor in zip(blocks, factors, strict=True):
            own = [gradient_times(p, factor) for p in pair]
            made.append(change(*own, block))
        return made

    n = len(blocks)
    return {
        LAST_BLOCK: call(with_gradients, [0] * (n - 1) + [1]),
        MEAN_OF_BLOCKS: call(with_gradients, [1 / n] * n),
    }


def tied_changes(s, blocks, lora_A, lora_B):
    def change(A, B, block):
        return s * (block["lora_v"][:, None] * B) @ (block["lora_u"][:, None] * A)

    def each(of, pair=(lora_A, lora_B)):
        return [of(*pair, block) for block in blocks]

    first = {k: blocks[0][k] for k in ("lora_u", "lora_v")}
    return {
        NO_MISTAKE: call(each, change),
        "u is left out": call(each, lambda A, B, o: s * (o["lora_v"][:, None] * B) @ A),
        "v is left out": call(each, lambda A, B, o: s * B @ (o["lora_u"][:, None] * A)),
        "u and v are left out: the plain pair": call(each, lambda A, B, o: s * B @ A),
        "u is on both sides": call(
            each, lambda A, B, o: change(A, B, o | {"lora_u": o["lora_u"] ** 2})
        ),
        "u and v of the first block for all": call(each, lambda A, B, o: change(A, B, o | first)),
        "1 + u and 1 + v in place of u and v": call(
            each, lambda A, B, o: change(A, B, {k: 1 + o[k] for k in ("lora_u", "lora_v")})
        ),
        "v scales the frozen layer too": call(
            each,
            lambda A, B, o: change(A, B, o) + (o["lora_v"][:, None] - 1) * o["weight"],
        ),
        **shared_of(change, blocks, (lora_A, lora_B)),
    }


def condlora_changes(s, blocks, lora_A, lora_B):
    def change(A, B, block):
        return s * (block["weight"] @ B) @ (A @ block["weight"].T)

    def each(of):
        return [of(lora_A, lora_B, block["weight"]) for block in blocks]

    first = blocks[0]["weight"]
    return {
        NO_MISTAKE: lambda: [change(lora_A, lora_B, block) for block in blocks],
        "A from the rows of W, Theta_A W": call(each, lambda A, B, W: s * (W @ B) @ (A @ W)),
        "B from the columns of W, W^T Theta_B": call(
            each, lambda A, B, W: s * (W.T @ B) @ (A @ W.T)
        ),
        "W is transposed in both, W^T Theta_B Theta_A W": call(
            each, lambda A, B, W: s * (W.T @ B) @ (A @ W)
        ),
        "W is left out: the plain pair": call(each, lambda A, B, W: s * B @ A),
        "W is left out of A": call(each, lambda A, B, W: s * (W @ B) @ A),
        "W is left out of B": call(each, lambda A, B, W: s * B @ (A @ W.T)),
        "the W of the first block for all": call(
            each, lambda A, B, W: s * (first @ B) @ (A @ first.T)
        ),
        **shared_of(change, blocks, (lora_A, lora_B)),
    }


def positive(U):
    return U * U.gather(0, U.abs().argmax(0, keepdim=True)).sign()


def subspaces(weights, r):
    """{cause: (d, r)}, the right one under NO_MISTAKE."""

    def left(matrix):
        return positive(torch.linalg.svd(matrix.double(), full_matrices=False)[0][:, :r])

    beside = torch.cat(weights, 1).double()
    singular = torch.linalg.svdvals(beside)[:r]
    return {
        NO_MISTAKE: left(beside),
        "the weights are stacked below one another": left(torch.cat([w.T for w in weights], 1)),
        "the subspace of W_q alone": left(weights[0]),
        "the subspace of the sum of the weights": left(sum(weights)),
        "the columns are centred first": left(beside - beside.mean(1, keepdim=True)),
        "the smallest singular values are taken": positive(
            torch.linalg.svd(beside, full_matrices=False)[0][:, -r:]
        ),
        "the largest entries are negative": -left(beside),
        "U is scaled by the singular values": left(beside) * singular,
        "U is scaled by the roots of the singular values": left(beside) * singular**0.5,
    }


def cora_changes(s, weights, lora_A):
    found = {}
    for cause, U in subspaces(weights, len(lora_A[0])).items():
        found[cause] = lambda U=U: [s * U.to(A) @ A for A in lora_A]
    return found


def reslora_changes(s, kind, blocks, pre):
    """Of the kind "block"."""

    def pairs(n, last, other=lambda n, k: (blocks[n - k]["lora_B"], blocks[n - k]["lora_A"])):
        return sum(s * b @ a for b, a in (other(n, k) for k in range(min(n, last) + 1)))

    def each(last, **more):
        return [pairs(n, last, **more) for n in range(len(blocks))]

    def held(n, k):
        b, a = blocks[n - k]["lora_B"], blocks[n - k]["lora_A"]
        return (b, a) if k == 0 else (b.detach(), a.detach())

    def own_b(n, k):
        return blocks[n]["lora_B"], blocks[n - k]["lora_A"]

    def own_a(n, k):
        return blocks[n - k]["lora_B"], blocks[n]["lora_A"]

    def following(n):
        return sum(s * o["lora_B"] @ o["lora_A"] for o in blocks[n : n + pre + 1])

    return {
        NO_MISTAKE: call(each, pre),
        "no block before is added: plain LoRA": call(each, 0),
        "one block too many is added": call(each, pre + 1),
        "one block too few is added": call(each, pre - 1),
        "all blocks before are added": call(each, len(blocks)),
        "the blocks after it are added": lambda: [following(n) for n in range(len(blocks))],
        "the own B with the A of the blocks before": call(each, pre, other=own_b),
        "the own A with the B of the blocks before": call(each, pre, other=own_a),
        "the mean of the pairs, not their sum": lambda: [
            pairs(n, pre) / (min(n, pre) + 1) for n in range(len(blocks))
        ],
        HELD: call(each, pre, other=held),
    }


# --------------------------------------------------------------- from changes of W to wrong answers

METHODS = {  # function -> (changes, what trains)
    "dora": (dora_changes, ("lora_A", "lora_B", "lora_magnitude")),
    "asymmetry": (asymmetry_changes, ("lora_B",)),
    "lora_xs": (lora_xs_changes, ("lora_R",)),
    "prolora": (
        prolora_changes,
        ("lora_A_shared", "lora_A_own", "lora_B_shared", "lora_B_own"),
    ),
    "sbora_fa": (sbora_fa_changes, ("lora_B",)),
    "sbora_fb": (sbora_fb_changes, ("lora_A",)),
    "adalora": (adalora_changes, ("lora_A", "lora_E", "lora_B")),
    "tied": (tied_changes, ("lora_A", "lora_B", "lora_u", "lora_v")),
    "condlora": (condlora_changes, ("lora_A", "lora_B")),
    "cora": (cora_changes, ("lora_A",)),
    "reslora": (reslora_changes, ("lora_A", "lora_B")),
}


def ranks(given):
    """r, which the scale has."""
    if "blocks" in given and "lora_A" not in given:
        given = given["blocks"][0]
    if "lora_A_shared" in given:
        return len(given["lora_A_shared"]) + len(given["lora_A_own"])
    if isinstance(given.get("lora_A"), list):
        return len(given["lora_A"][0])
    return len(given[next(k for k in ("lora_A", "lora_R", "index") if k in given)])


def wrong_changes(method, lora_alpha, **given):
    """{cause: function(given) -> change of W, or a list of changes}, NO_MISTAKE among them."""
    changes, r = METHODS[method][0], ranks(given)
    s = lora_alpha / r

    def change(p, s, cause):
        return changes(s, **p)[cause]()

    wrong = {cause: call(change, s=s, cause=cause) for cause in changes(s, **given)}
    for cause, other in scales(lora_alpha, r).items():
        wrong[cause] = call(change, s=other, cause=NO_MISTAKE)
    return wrong


def weight_change(method, given):
    changes, rest = wrong_changes(method, **given), without(given, "lora_alpha")
    right = call(changes[NO_MISTAKE], rest)
    for cause, change in changes.items():
        if cause != NO_MISTAKE and cause not in GRADIENT_ALONE:
            yield cause, call(change, rest)
    if "weight" in given:
        yield "the merged weight, not its change", lambda: given["weight"] + right()
        if len(given["weight"]) == given["weight"].shape[1]:
            yield "transposed, (in, out)", lambda: right().T


def without(given, *names):
    return {k: v for k, v in given.items() if k not in names}


def with_leaves(value):
    """Nested copies; floating-point tensors want a gradient."""
    if torch.is_tensor(value):
        return value.clone().requires_grad_(value.is_floating_point())
    if isinstance(value, dict):
        return {k: with_leaves(v) for k, v in value.items()}
    return [with_leaves(v) for v in value] if isinstance(value, list) else value


def tensors_of(given, name):
    return given[name] if name in given else of_blocks(given["blocks"], name)


def wrong_layer(method, x, bias, grad, lora_alpha, change, bias_too=None, **given):
    """y and gradients of one layer with that change of its weight."""
    p = with_leaves({**given, "x": x})
    x, weight = p.pop("x"), p["weight"]
    delta = change(p)
    y = x @ (weight + delta).T + (bias if bias_too is None else bias * bias_too(p, delta))
    return differentiate(y, grad, {"x": x, **{k: p[k] for k in METHODS[method][1]}})


def layer_mistakes(method, x, bias, grad, **given):
    rest = {"x": x, "bias": bias, "grad": grad, **given}
    wrong = wrong_changes(method, **given)
    for cause, change in wrong.items():
        if cause != NO_MISTAKE:
            yield cause, call(wrong_layer, method, change=change, **rest)
    right = call(wrong_layer, method, change=wrong[NO_MISTAKE])
    yield "the bias is missing", call(right, **{**rest, "bias": 0 * bias})

    def without_base():
        full, base = right(**rest), x @ given["weight"].T + bias
        return {**full, "y": full["y"] - base, "x": full["x"] - grad @ given["weight"]}

    yield "the frozen layer is missing", without_base
    yield (
        "gradients divided by the number of rows",
        lambda: {k: v / (1 if k in ("y", "x") else len(x)) for k, v in right(**rest).items()},
    )


def dora(**arguments):
    yield from layer_mistakes("dora", **arguments)
    wrong = wrong_changes("dora", **without(arguments, "x", "bias", "grad"))[NO_MISTAKE]

    def ratio(p, delta):
        v = p["weight"].detach() + delta.detach()
        plain = p["weight"] + arguments["lora_alpha"] / len(p["lora_A"]) * p["lora_B"] @ p["lora_A"]
        return v[:, 0].detach() * 0 + p["lora_magnitude"] / plain.norm(dim=1).detach()

    yield (
        "the bias is scaled as well",
        call(wrong_layer, "dora", change=wrong, bias_too=ratio, **arguments),
    )


def frozen_too(method, more, **arguments):
    """The right answer, with gradients of what is frozen beside it; more: function(G) -> them."""
    given = without(arguments, "x", "bias", "grad")
    change = wrong_changes(method, **given)[NO_MISTAKE]
    full = wrong_layer(method, change=change, **arguments)
    return {**full, **more(arguments["grad"].T @ arguments["x"])}


def asymmetry(**arguments):
    yield from layer_mistakes("asymmetry", **arguments)
    B, s = arguments["lora_B"], arguments["lora_alpha"] / len(arguments["lora_A"])
    more = {"more": lambda G: {"lora_A": s * B.T @ G}}
    yield "A has a gradient, too: it is frozen", call(frozen_too, "asymmetry", **more, **arguments)


def lora_xs(**arguments):
    yield from layer_mistakes("lora_xs", **arguments)


def prolora(**arguments):
    yield from layer_mistakes("prolora", **arguments)


def sbora_fa(**arguments):
    yield from layer_mistakes("sbora_fa", **arguments)


def sbora_fb(**arguments):
    yield from layer_mistakes("sbora_fb", **arguments)


def adalora(**arguments):
    yield from layer_mistakes("adalora", **arguments)


# ----------------------------------------------------------------------------------- several layers


def wrong_blocks(method, blocks, change, lora_alpha, **given):
    """y and gradients of several blocks with those changes of their weights."""
    p = with_leaves({**given, "blocks": blocks})
    inputs, changes = of_blocks(p["blocks"], "x"), change(p)
    y = [
        x @ (block["weight"] + delta).T
        for x, block, delta in zip(inputs, p["blocks"], changes, strict=True)
    ]
    trained = {k: tensors_of(p, k) for k in METHODS[method][1]}
    grads = of_blocks(blocks, "grad")
    return differentiate(y, grads, {"x": inputs, **trained})


def block_mistakes(method, blocks, lora_alpha, **given):
    rest = {"blocks": blocks, "lora_alpha": lora_alpha, **given}
    for cause, change in wrong_changes(method, **rest).items():
        if cause != NO_MISTAKE:
            yield cause, call(wrong_blocks, method, change=change, **rest)


def tied(**arguments):
    yield from block_mistakes("tied", **arguments)


def condlora(**arguments):
    yield from block_mistakes("condlora", **arguments)


def cora(x, weights, lora_A, lora_alpha, grads):
    def answer(U, s):
        p = with_leaves({"x": x, "lora_A": lora_A})
        y = [p["x"] @ (w + s * U @ a).T for w, a in zip(weights, p["lora_A"], strict=True)]
        found = differentiate(y, grads, {"x": p["x"], "lora_A": p["lora_A"]})
        return {**found, "common": U}

    r = len(lora_A[0])
    spaces = {cause: U.to(x) for cause, U in subspaces(weights, r).items()}
    for cause, U in spaces.items():
        if cause != NO_MISTAKE:
            yield cause, call(answer, U, lora_alpha / r)
    for cause, s in scales(lora_alpha, r).items():
        yield cause, call(answer, spaces[NO_MISTAKE], s)


def reslora(kind, blocks, pre, lora_alpha):
    if kind == "block":
        rest = {"kind": kind, "pre": pre, "lora_alpha": lora_alpha}
        yield from block_mistakes("reslora", blocks, **rest)
        return
    for cause in RESLORA_MISTAKES[kind]:
        yield cause, call(wrong_chain, kind, blocks, pre, lora_alpha / ranks(blocks[0]), cause)
    for cause, s in scales(lora_alpha, ranks(blocks[0])).items():
        yield cause, call(wrong_chain, kind, blocks, pre, s, NO_MISTAKE)


RESLORA_MISTAKES = {
    "input": (
        "no block before is added: plain LoRA",
        "one block too many is added",
        "the input of the block after it is added",
        "the first block takes its own input twice, as published",
        "the mean of the inputs, not their sum",
        "W takes the sum of the inputs, too",
        "no gradient to the input of the block before",
    ),
    "middle": (
        "no block before is added: plain LoRA",
        "one block too many is added",
        "one block too few is added",
        "all blocks before are added",
        "the own A on the inputs of the blocks before",
        "the A of the blocks before on the own input",
        "the mean of the parts, not their sum",
        "the B of the blocks before, not the own one",
        HELD,
    ),
}


def taken(kind, blocks, n, k, mistake):
    """What block n gets from block n - k, k > 0: (n, in), or (n, r)."""
    before, own = blocks[n - k], blocks[n]
    if kind == "input":
        held = mistake == "no gradient to the input of the block before"
        return before["x"].detach() if held else before["x"]
    if mistake == "the own A on the inputs of the blocks before":
        return before["x"] @ own["lora_A"].T
    if mistake == "the A of the blocks before on the own input":
        return own["x"] @ before["lora_A"].T
    part = before["x"] @ before["lora_A"].T
    return part.detach() if mistake == HELD else part


def wrong_chain(kind, blocks, pre, s, mistake):
    """ResLoRA's input and middle with one mistake."""
    p = with_leaves(blocks)
    reach = {
        "no block before is added: plain LoRA": 0,
        "one block too many is added": pre + 1,
        "one block too few is added": pre - 1,
        "all blocks before are added": len(p),
    }.get(mistake, pre)
    y = []
    for n, block in enumerate(p):
        own = block["x"] if kind == "input" else block["x"] @ block["lora_A"].T
        parts = [own, *(taken(kind, p, n, k, mistake) for k in range(1, min(n, reach) + 1))]
        if mistake == "the input of the block after it is added":
            parts = [o["x"] for o in p[n : n + 2]]
        elif mistake == "the first block takes its own input twice, as published" and n == 0:
            parts = [own, own]
        total = sum(parts) / (len(parts) if mistake.startswith("the mean") else 1)
        low = total @ block["lora_A"].T if kind == "input" else total
        into = total if mistake == "W takes the sum of the inputs, too" else block["x"]
        branch = low @ block["lora_B"].T
        if mistake == "the B of the blocks before, not the own one":
            behind = [p[n - k]["lora_B"] for k in range(len(parts))]
            branch = sum(part @ b.T for part, b in zip(parts, behind, strict=True))
        y.append(into @ block["weight"].T + s * branch)
    wanted = {k: of_blocks(p, k) for k in ("x", "lora_A", "lora_B")}
    return differentiate(y, of_blocks(blocks, "grad"), wanted)
