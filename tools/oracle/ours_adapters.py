"""The interface of the oracle, of other forms of LoRA's branch, with this repository's answers.

    a layer    dora, asymmetry, lora_xs, prolora, sbora_fa, sbora_fb, adalora
    blocks     tied, condlora, cora, reslora
    both       weight_change

It is a part of ours.py, whose introduction holds for it.

What this file does not do: start a method (each gets what it has at some point of its training).
"""

import functools

from torch import nn

from relatives import METHODS
from relatives.triplets import AdaLoRALayer
from tools.oracle.network import differentiate, linear_of


def made(kind, weight, bias, r, lora_alpha, given, **more):
    """A layer of METHODS[kind], or of a class, whose parameters are given by name."""
    kind = METHODS["adapter"][kind] if isinstance(kind, str) else kind
    base = linear_of(weight, bias)
    layer = kind(base, base.in_features, base.out_features, r, lora_alpha, **more)
    for name, value in given.items():
        old = getattr(layer, name)
        setattr(layer, name, nn.Parameter(value.clone(), requires_grad=old.requires_grad))
    return layer


def answer(layer, x, grad):
    """The output, and the gradients of x and of what trains."""
    x = x.clone().requires_grad_(True)
    return differentiate(layer(x), grad, {"x": x, **layer.factors()})


# ---------------------------------------------------------------------------------------- one layer


def dora_layer(weight, bias, lora_alpha, **given):
    return made("dora", weight, bias, len(given["lora_A"]), lora_alpha, given)


def dora(x, weight, bias, lora_A, lora_B, lora_magnitude, lora_alpha, grad):
    """DoRA (arXiv 2402.09353): y = m o (V x) / ||V|| + b with V = W + scaling B A.

    ||V|| (out,) has the norm of each row of V, all that reaches one output. It is of the V of now,
    and is held constant in the gradient (section 4.3 of the paper). There is no dropout.

    Args:
        x: (n, in). bias: b, (out,). lora_magnitude: m, (out,). grad: dL/dy, (n, out).

    Returns:
        {"y": (n, out), and dL/d of "x", "lora_A", "lora_B", "lora_magnitude"}.
    """
    pair = {"lora_A": lora_A, "lora_B": lora_B, "lora_magnitude": lora_magnitude}
    return answer(dora_layer(weight, bias, lora_alpha, **pair), x, grad)


def asymmetry_layer(weight, bias, lora_alpha, **given):
    return made("asymmetry", weight, bias, len(given["lora_A"]), lora_alpha, given)


def asymmetry(x, weight, bias, lora_A, lora_B, lora_alpha, grad):
    """Asymmetry (arXiv 2402.16842): y = W x + b + scaling B A x, where A is frozen and B trains.

    A comes with orthonormal rows, and is used as it comes.

    Returns:
        {"y", and dL/d of "x", "lora_B"}: A has no gradient.
    """
    layer = asymmetry_layer(weight, bias, lora_alpha, lora_A=lora_A, lora_B=lora_B)
    return answer(layer, x, grad)


def lora_xs_layer(weight, bias, lora_alpha, **given):
    return made("lora_xs", weight, bias, len(given["lora_R"]), lora_alpha, given)


def lora_xs(x, weight, bias, lora_R, lora_alpha, grad):
    """LoRA-XS (arXiv 2405.17604): y = W x + b + scaling U_r R S_r V_r^T x; R (r, r) alone trains.

    W = U S V^T, and U_r, S_r, V_r belong to the r largest singular values. The signs are free, so
    that they are fixed here: in each column of U_r the entry of the largest absolute value is
    positive, and the column of V_r goes with it. Scaling is lora_alpha / r.

    Returns:
        {"y", and dL/d of "x", "lora_R"}.
    """
    return answer(lora_xs_layer(weight, bias, lora_alpha, lora_R=lora_R), x, grad)


def prolora_layer(weight, bias, lora_alpha, x_A, x_B, **given):
    own = len(given["lora_A_own"])
    r = len(given["lora_A_shared"]) + own
    more = {"unshared_r": own, "x_A": x_A, "x_B": x_B}
    return made("prolora", weight, bias, r, lora_alpha, given, **more)


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
    """PRoLoRA (arXiv 2402.16902): y = W x + b + scaling B A x, A and B with a repeated chunk.

    u ranks are plain, r - u are made of a chunk that is repeated along the features, each copy
    rotated along the ranks:

        A = [copy 0, copy 1, … copy x_A - 1] (r - u, in) above lora_A_own (u, in)
        copy j, row k = the chunk's row (k + j shift) mod (r - u)
        shift = max(1, floor((r - u) / x_A))

    and B^T likewise, of the chunk lora_B_shared^T and x_B copies. Scaling is lora_alpha / r.

    Args:
        lora_A_shared: (r - u, in / x_A). lora_A_own: (u, in).
        lora_B_shared: (out / x_B, r - u). lora_B_own: (out, u).

    Returns:
        {"y", and dL/d of "x", "lora_A_shared", "lora_A_own", "lora_B_shared", "lora_B_own"}.
    """
    chunks = {"lora_A_shared": lora_A_shared, "lora_B_shared": lora_B_shared}
    own = {"lora_A_own": lora_A_own, "lora_B_own": lora_B_own}
    return answer(prolora_layer(weight, bias, lora_alpha, x_A, x_B, **chunks, **own), x, grad)


def sbora_layer(kind, weight, bias, lora_alpha, index, **given):
    layer = made(kind, weight, bias, len(index), lora_alpha, given)
    layer.lora_index = index
    return layer


def sbora_fa(x, weight, bias, index, lora_B, lora_alpha, grad):
    """SBoRA-FA (arXiv 2407.05413): y = W x + b + scaling B x[S]; A is rows of the identity.

    Args:
        index: S, (r,) int64: row k of A is row S[k] of the identity. lora_B: (out, r).

    Returns:
        {"y", and dL/d of "x", "lora_B"}.
    """
    return answer(sbora_layer("sbora_fa", weight, bias, lora_alpha, index, lora_B=lora_B), x, grad)


def sbora_fb(x, weight, bias, index, lora_A, lora_alpha, grad):
    """SBoRA-FB (arXiv 2407.05413): scaling (A x)_k is added to y[S[k]], y = W x + b without it.

    Args:
        index: S, (r,) int64: column k of B is column S[k] of the identity. lora_A: (r, in).

    Returns:
        {"y", and dL/d of "x", "lora_A"}.
    """
    return answer(sbora_layer("sbora_fb", weight, bias, lora_alpha, index, lora_A=lora_A), x, grad)


def adalora_layer(weight, bias, lora_alpha, **given):
    return made(AdaLoRALayer, weight, bias, len(given["lora_A"]), lora_alpha, given)


def adalora(x, weight, bias, lora_A, lora_E, lora_B, lora_alpha, grad):
    """AdaLoRA (arXiv 2303.10512): y = W x + b + scaling B diag(E) A x. lora_E: E, (r, 1).

    A rank whose E is 0 counts in r nevertheless.

    Returns:
        {"y", and dL/d of "x", "lora_A", "lora_E", "lora_B"}.
    """
    given = {"lora_A": lora_A, "lora_E": lora_E, "lora_B": lora_B}
    return answer(adalora_layer(weight, bias, lora_alpha, **given), x, grad)


# ---------------------------------------------------------------------- one place in several blocks


def connected(kind, layers):
    """The layers, as the module of one place in the blocks 0, 1, …"""
    kind.connect({f"layers.{i}.q_proj": layer for i, layer in enumerate(layers)}, 0)
    return layers


def answers(layers, inputs, grads, **wanted):
    """As answer, for one layer a block; the blocks do not feed each other."""
    inputs = [x.clone().requires_grad_(True) for x in inputs]
    outputs = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
    return differentiate(outputs, grads, {"x": inputs, **wanted})


def by_block(blocks, name):
    return [block[name] for block in blocks]


def shared_layers(kind, blocks, lora_A, lora_B, lora_alpha, own=()):
    """Layers of a method whose blocks share A and B: those of the first one."""
    layers = []
    for block in blocks:
        given = {"lora_A": lora_A, "lora_B": lora_B, **{name: block[name] for name in own}}
        layers.append(made(kind, block["weight"], None, len(lora_A), lora_alpha, given))
    return connected(METHODS["adapter"][kind], layers)


def tied_layers(blocks, lora_A, lora_B, lora_alpha):
    return shared_layers("tied", blocks, lora_A, lora_B, lora_alpha, ("lora_u", "lora_v"))


def tied(blocks, lora_A, lora_B, lora_alpha):
    """Tied-LoRA (arXiv 2311.09578, TL6): y = W x + scaling diag(v) B diag(u) A x, block by block.

    A and B are shared by all blocks; W, u and v are a block's own, and all but W trains. Each
    block gets its own x: the blocks do not feed each other, and L is the sum of what they add.

    Args:
        blocks: list of dicts with x (n, in), weight (out, in), lora_u (r,), lora_v (out,) and
            grad = dL/dy (n, out).

    Returns:
        {"y": [of each block], dL/d of "lora_A", "lora_B", and of "x", "lora_u", "lora_v": [of each
        block]}.
    """
    layers = tied_layers(blocks, lora_A, lora_B, lora_alpha)
    pair = {"lora_A": layers[0].lora_A, "lora_B": layers[0].lora_B}
    own = {name: [getattr(a, name) for a in layers] for name in ("lora_u", "lora_v")}
    return answers(layers, by_block(blocks, "x"), by_block(blocks, "grad"), **pair, **own)


def condlora_layers(blocks, lora_A, lora_B, lora_alpha):
    return shared_layers("condlora", blocks, lora_A, lora_B, lora_alpha)


def condlora(blocks, lora_A, lora_B, lora_alpha):
    """CondLoRA (arXiv 2403.14946): y = W x + scaling (W Theta_B) (Theta_A W^T) x, block by block.

    The pair of a block is made from its frozen, square W by two maps that all blocks share; there
    is no gradient through W. r is the number of rows of Theta_A.

    Args:
        blocks: list of dicts with x (n, d), weight (d, d) and grad (n, d), as for tied.
        lora_A: Theta_A, (r, d). lora_B: Theta_B, (d, r).

    Returns:
        {"y": [of each block], dL/d of "lora_A", "lora_B", and of "x": [of each block]}.
    """
    layers = condlora_layers(blocks, lora_A, lora_B, lora_alpha)
    pair = {"lora_A": layers[0].lora_A, "lora_B": layers[0].lora_B}
    return answers(layers, by_block(blocks, "x"), by_block(blocks, "grad"), **pair)


def cora_layers(weights, lora_A, lora_alpha):
    kind, places, layers = METHODS["adapter"]["cora"], ("q_proj", "k_proj", "v_proj"), {}
    for place, weight, A in zip(places, weights, lora_A, strict=True):
        layers[f"layers.0.{place}"] = made(kind, weight, None, len(A), lora_alpha, {})
    kind.connect(layers, 0)
    for layer, A in zip(layers.values(), lora_A, strict=True):
        layer.lora_A = nn.Parameter(A.clone())
    return list(layers.values())


def cora(x, weights, lora_A, lora_alpha, grads):
    """CoRA (arXiv 2409.02119), B frozen: y = W x + scaling U_r A x for each W of W_q, W_k, W_v.

    U_r (d, r) holds the left singular vectors of [W_q, W_k, W_v] (d, 3 d), the three beside each
    other, that belong to the r largest singular values. In each of its columns the entry of the
    largest absolute value is positive.

    Args:
        x: (n, d), the same for all three. weights: [W_q, W_k, W_v], each (d, d).
        lora_A: [A of q, k, v], each (r, d), which trains. grads: [dL/dy of q, k, v].

    Returns:
        {"y": [of q, k, v], "common": U_r, dL/d of "x", and of "lora_A": [of q, k, v]}.
    """
    layers, x = cora_layers(weights, lora_A, lora_alpha), x.clone().requires_grad_(True)
    wanted = {"x": x, "lora_A": [layer.lora_A for layer in layers]}
    found = differentiate([layer(x) for layer in layers], grads, wanted)
    return {**found, "common": layers[0].lora_B.detach()}


def reslora_layers(kind, blocks, pre, lora_alpha):
    kind = METHODS["adapter"][f"reslora_{kind}"]
    kind = type(kind.__name__, (kind,), {"pre": pre})
    layers = []
    for block in blocks:
        given = {name: block[name] for name in ("lora_A", "lora_B")}
        layers.append(made(kind, block["weight"], None, len(block["lora_A"]), lora_alpha, given))
    return connected(kind, layers)


def reslora(kind, blocks, pre, lora_alpha):
    """ResLoRA (arXiv 2402.18039): block n takes from the same place in the blocks before it.

        input    y_n = W_n x_n + scaling B_n A_n (x_n + x_{n-1})
        block    y_n = W_n x_n + scaling sum_{k = 0 … pre} B_{n-k} A_{n-k} x_n
        middle   y_n = W_n x_n + scaling B_n (A_n x_n + sum_{k = 1 … pre} A_{n-k} x_{n-k})

    What lies before block 0 is left out (block 0 is plain LoRA). Each block gets its own x, as for
    tied; r and lora_alpha are the same in all.

    Args:
        kind: "input", "block" or "middle". pre: int, 1 for "input".
        blocks: list of dicts with x (n, in), weight, lora_A, lora_B and grad = dL/dy (n, out).

    Returns:
        {"y", and dL/d of "x", "lora_A", "lora_B": each a list, of each block}.
    """
    layers = reslora_layers(kind, blocks, pre, lora_alpha)
    pairs = {name: [getattr(a, name) for a in layers] for name in ("lora_A", "lora_B")}
    return answers(layers, by_block(blocks, "x"), by_block(blocks, "grad"), **pairs)


# -------------------------------------------------------------------------------------- all of them

LAYERS = {  # the arguments of weight_change -> a layer, or a list of layers
    "dora": dora_layer,
    "asymmetry": asymmetry_layer,
    "lora_xs": lora_xs_layer,
    "prolora": prolora_layer,
    "sbora_fa": functools.partial(sbora_layer, "sbora_fa"),
    "sbora_fb": functools.partial(sbora_layer, "sbora_fb"),
    "adalora": adalora_layer,
    "tied": tied_layers,
    "condlora": condlora_layers,
    "cora": cora_layers,
    "reslora": reslora_layers,
}


def weight_change(method, given):
    """What merging adds to W, (out, in): y - W x - b is this matrix times x, whatever x is.

    Args:
        method: the name of one of the functions above. Raise NotImplementedError for those you
            have not.
        given: dict with the arguments of that function, without x, bias, grad and grads, also in
            blocks. reslora comes with kind "block", which alone has such a matrix.

    Returns:
        the matrix; for tied, condlora, cora and reslora a list of them, in the order given.
    """
    single = method not in ("tied", "condlora", "cora", "reslora")
    layers = LAYERS[method](**given, **({"bias": None} if single else {}))
    if single:
        return layers.delta_w().detach()
    return [layer.delta_w().detach() for layer in layers]
