"""Zero-cost proxies: how much does each low-rank module matter? (arXiv 2406.14956)

Each proxy is one function (model, batches) -> {name: score}; larger = keep. All modules, those on
shortcuts among them, are scored alike and together, with all of them switched on. L is the mean
loss over all scored examples, of a language model over all their predicted tokens, so that no score
but synflow_released's depends on how they were cut into batches. Of several processes each takes
its share of the batches; gradients and counts are summed (support/distributed.py).

    proxy          | score of a pair h = base(x) + s B A x, s = lora_alpha / r | at B = 0
    constant       | 1                                                         | 1
    grad_norm      | ||dL/dA||_F + ||dL/dB||_F                                 | ||s G A^T||_F
    snip           | sum |A o dL/dA| + sum |B o dL/dB|                         | exactly 0
    synflow        | sum |A o dR/dA| + sum |B o dR/dB|, R: see synflow below   | exactly 0
    grasp          | sum A o (H g)_A + sum B o (H g)_B                         | ||dL/dB||_F^2
    fisher         | 1/2 mean_n sum_k (A_k . dL_n/dA_k)^2                      | exactly 0
    alpha_test     | 10 x the smallest a with which (a s) B A keeps accuracy   | exactly 0
    grad_norm_slot | ||G||_F                                                   | the same
    snip_slot      | sum |W o G|                                               | the same

G = dL/dW, and W is the matrix that has this place: the frozen weight, of a residual the identity,
of a cross-layer shortcut zero. The two slot scores say what the place is worth, the others what
this pair in it is worth. A_k is row k of A, o the product entry by entry. synflow_released and
alpha_test_released, at the end, compute what the authors' released code does.

constant, grad_norm, snip, synflow and alpha_test are HeteroLoRA's. grasp and fisher come from
zero-cost-nas, and the slot scores are ours.

WHAT B = 0 DOES. lora_B starts at zero, so dL/dA = s B^T G = 0, and a score that multiplies each
factor by its own gradient is exactly 0 for every module; so is alpha_test, as the branch does
nothing yet. With SNIP, SYNFLOW, FISHER and ALPHA-TEST the first choice is then a random draw, and
score() warns. With the first three a dynamic run stays with that draw: what was on has B other than
0 and scores above 0, and what was never on scores 0 again. GRAD-NORM lives, as ||s G A^T||: a
random projection of G, proportional to s.

What this file does not do: choose (allocate.py), or change anything. Parameters, buffers, .grad,
requires_grad, train/eval mode, on/off and the RNG are as before, also when the loss raises.
"""

import contextlib
import copy
import math
import types
import warnings

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lora import RESIDUALS, adapters
from support import distributed, large
from support.doors import refuse_batches, refuse_numbers

WITHOUT_DATA = ("constant", "synflow")  # these read no batch
ALPHA_TOLERANCE = 0.01  # ours: the share of accuracy that alpha_test may lose


def score(name, model, batches):
    """Score every LoRALayer of a model.

    Args:
        name: a key of PROXIES.
        model: model.Transformer with adapters, not merged; left bit-identical.
        batches: list of batches (dicts with input_ids, attention_mask, labels, …) on the model's
            device.

    Returns:
        dict name -> float, in the order of lora.adapters; larger = keep.

    Raises:
        ValueError: unknown proxy; a model or batches that refuse_unscorable does not let in; a
            score that is not finite; or a proxy that does not go with the model: alpha_test without
            classes, fisher where lora_A does not train, one that reads weights beside lazy
            Delta-LoRA, one that needs whole weights where they are sharded.

    Warns:
        UserWarning: all scores are zero, so whatever is chosen from them is chosen at random.
    """
    if name not in PROXIES:
        raise ValueError(f"unknown proxy {name!r}, allowed: {', '.join(PROXIES)}")
    refuse_unscorable(model, batches)
    large.refuse_proxy(name, model)
    scores = PROXIES[name](model, batches)
    for module, value in scores.items():
        if not math.isfinite(value):
            raise ValueError(
                f"the {name} score of {module} is {value}: look for a loss that overflows, or "
                "score in float32 (synflow: the model is too deep for float64)"
            )
    if not any(scores.values()):
        warnings.warn(
            f"all {name} scores are zero: the choice is random; while B A is zero, "
            "grad_norm, grasp, grad_norm_slot and snip_slot still tell modules apart",
            stacklevel=2,
        )
    return scores


def refuse_unscorable(model, batches):
    """The door of every score: raises ValueError for a model or batches without one."""
    layers = adapters(model)
    refuse_numbers(model)
    if not layers or any(layer.merged for layer in layers.values()):
        raise ValueError("scoring needs a model with LoRA modules that are not merged")
    refuse_batches(model, batches)


# ----------------------------------------------------------------------------------- leave no trace


@contextlib.contextmanager
def scoring(model):
    """All modules and ranks on, eval mode, a gradient for the factors alone; then all as before.

    deviates: the released code scores in train mode, where a score depends on a dropout mask.
    """
    layers = adapters(model)
    on = {name: (layer.enabled, layer.ranks_off) for name, layer in layers.items()}
    training = {module: module.training for module in model.modules()}
    requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.eval().requires_grad_(False)
        for layer in layers.values():
            layer.enabled, layer.ranks_off = True, []
            for factor in layer.factors().values():
                factor.requires_grad_(True)
        yield layers
    finally:
        for name, layer in layers.items():
            layer.enabled, layer.ranks_off = on[name]
        for module, mode in training.items():
            module.training = mode
        for parameter, flag in requires_grad.items():
            parameter.requires_grad_(flag)


def loss_terms(model, batch):
    """How many numbers the loss of a batch is the mean of: examples, or predicted tokens."""
    labels = batch["labels"]
    return int((labels[:, 1:] != -100).sum()) if model.config.head == "lm" else len(labels)


def mean_gradients(model, batches, parameters):
    """dL/dp of the mean loss L of all batches, in the order of parameters; .grad is not used.

    deviates: the released code sums the gradients of the batches' means, so that its scores grow
    with their number.
    """
    total = sum(loss_terms(model, batch) for batch in batches)
    sums = [torch.zeros_like(p, dtype=large.wide(p)[1]) for p in parameters]
    for batch, once in distributed.shares(batches):
        # L = sum over batches of (their share of the examples or tokens) * (their mean loss)
        loss = model(**batch).loss * (once * loss_terms(model, batch) / total)
        gradients = torch.autograd.grad(loss, parameters)
        sums = [s + g for s, g in zip(sums, gradients, strict=True)]
    return distributed.sum_tensors(sums)


def factors_of(layers):
    """The factors of all modules in one list: [A, B, A, B, …]."""
    return [factor for layer in layers.values() for factor in layer.factors().values()]


def by_module(layers, values):
    """{name: [value of each factor]} from a list in the order of factors_of."""
    rest = iter(values)
    return {name: [next(rest) for _ in layer.factors()] for name, layer in layers.items()}


def factor_gradients(model, batches):
    """{name: [(factor, dL/dfactor)]}; of a LoRALayer A, (r, in), and B, (out, r)."""
    with scoring(model) as layers:
        factors = factors_of(layers)
        gradients = mean_gradients(model, batches, factors)
        detached = [factor.detach() for factor in factors]
        return by_module(layers, zip(detached, gradients, strict=True))


# -------------------------------------------------------------------------------------- the proxies


def constant(model, batches):
    """S = 1: every module alike, so that a fraction of them is a random draw. The paper's control.

    A budget in parameters buys as many as it can: of modules of different size the small ones.
    """
    return dict.fromkeys(adapters(model), 1.0)


def grad_norm(model, batches):
    """GRAD-NORM, the proxy that HeteroLoRA settles on (arXiv 2406.14956; its released code).

    As released, the sum of the two norms, not the norm of both together. At B = 0 the first is 0
    and the second ||s G A^T||_F, which grows with s: with alpha 16 a LoRA module scores four
    times what it would with a shortcut's alpha of 4.
    """
    scores = {}
    for name, found in factor_gradients(model, batches).items():
        # S = ||dL/dA||_F + ||dL/dB||_F
        scores[name] = sum(g.norm() for _, g in found).item()
    return scores


def snip(model, batches):
    """SNIP: what removing each weight would change, to first order (arXiv 1810.02340, Eq. 3-4).

    deviates: not divided by the sum over all modules (neither is the released code); the ranking is
    the same. At B = 0 it is exactly 0: the first term by its gradient, the second by its weight.
    """
    scores = {}
    for name, found in factor_gradients(model, batches).items():
        # S = sum |A o dL/dA| + sum |B o dL/dB|
        scores[name] = sum((p * g).abs().sum() for p, g in found).item()
    return scores


def flow(model, objective):
    """{name: sum |A o dR/dA| + sum |B o dR/dB|} with R = objective(model)."""
    layers = adapters(model)
    factors = factors_of(layers)
    for factor in factors:
        factor.requires_grad_(True)
    gradients = torch.autograd.grad(objective(model), factors)
    terms = [(p * g).abs().sum().item() for p, g in zip(factors, gradients, strict=True)]
    return {name: sum(values) for name, values in by_module(layers, terms).items()}


def absolute_copy(model):
    """A copy with |parameter| everywhere, all modules and ranks on, eval mode, none trainable."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data.abs_()
    for layer in adapters(model).values():
        layer.enabled, layer.ranks_off = True, []
    return model


def weight_one(x):
    """x / x, the denominator a constant to autograd: 1 with the flow of x; 0 where x is 0."""
    constant = x.detach()
    return x / constant.where(constant > 0, 1)


def linear_attention(block, queries, x, key_mask, causal, turns, cache):
    """Attention without softmax: V, weighed by S / S with S = q . k (weight_one).

    On identical tokens softmax has a zero Jacobian, and q and k would score 0. Here the flow
    through q, and through k, is the whole flow through v. They are given x as a constant: what
    flows to the blocks below does so through v alone, once. The one token is at position 0, where
    nothing is turned.
    """
    q = block.split_heads(block.q_proj(queries.detach()))  # (1, h, 1, d_h)
    k = block.split_heads(block.k_proj(x.detach()))  # (1, g, 1, d_h)
    v = block.split_heads(block.v_proj(x))
    k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
    q, k = (part / part.detach().amax().clamp(min=1) for part in (q, k))  # S / S the same, S finite
    s = q @ k.transpose(-1, -2)  # (1, h, 1, 1)
    h = weight_one(s) @ v  # (1, h, 1, d_h)
    return block.out_proj(h.transpose(1, 2).flatten(2))  # (1, 1, d)


def linear_feed_forward(block, x):
    """The feed-forward without its activation; a gate weighs as S does, by gate / gate."""
    h = block.fc1(x)  # (1, 1, ffn_dim)
    if block.gate_proj is not None:
        h = weight_one(block.gate_proj(x.detach())) * h
    return block.fc2(h)  # (1, 1, d)


def synflow(model, batches):
    """SYNFLOW: how much of the flow through |net| runs through a pair (arXiv 2006.05467, Alg. 1).

    R is the sum of the output of |net|, the network with the absolute value of every parameter, for
    an input of ones: no data, no labels. In float64, since R is a product over layers and leaves
    float32's range. At B = 0: exactly 0. Elsewhere S(A) = S(B): what flows into a pair flows out.

    deviates from zero-cost-nas: Algorithm 1 takes a net to be linear, and a transformer is not.
    With softmax and one token q and k score 0; with LayerNorm what flows into a pair does not flow
    out of it. So the norms and the activation are the identity; attention is linear_attention, and
    a gate weighs by 1 in the same way.
    Half of a pair's score is then the part of R that runs through it, R at most. R is read before
    the head, whose tanh saturates. The input is one token of ones: identical tokens would all carry
    the same.
    """
    model = absolute_copy(model).double()
    for block in model.layers:
        block.attn_norm = block.ffn_norm = nn.Identity()
        block.attention = types.MethodType(linear_attention, block)
        block.feed_forward = types.MethodType(linear_feed_forward, block)
    model.final_norm = nn.Identity()
    one = model.word_embeddings.weight.new_ones(1, 1, model.config.hidden_size)  # (b, t, d)
    # S = sum |A o dR/dA| + sum |B o dR/dB|
    return flow(model, lambda m: m.encode(one, one[..., 0].bool()).sum())


def grasp(model, batches):
    """GraSP: what holds the gradient up (arXiv 2002.07376, Eq. 8).

    g = dL/dtheta and H = d2L/dtheta2 are over the factors theta of all modules. Removing weights
    changes ||g||^2 / 2 by -theta . H g, to first order; what holds it up is kept. At B = 0 it is
    ||dL/dB||_F^2: the ranking of grad_norm.

    deviates: the sign is opposite to zero-cost-nas, whose sum -theta . H g is -||dL/dB||_F^2 at
    B = 0 and would keep the modules that learn least. Two passes, so that g is the gradient of all
    batches (zero-cost-nas: of the last).
    """
    with scoring(model) as layers, sdpa_kernel(SDPBackend.MATH):  # flash has no second derivative
        factors = factors_of(layers)
        g = mean_gradients(model, batches, factors)
        total = sum(loss_terms(model, batch) for batch in batches)
        hg = [torch.zeros_like(p) for p in factors]
        for batch, once in distributed.shares(batches):
            loss = model(**batch).loss * (once * loss_terms(model, batch) / total)
            first = torch.autograd.grad(loss, factors, create_graph=True)
            # H g = d (g . dL/dtheta) / dtheta, with g held constant
            each = {id(p): (a * b).sum() for p, a, b in zip(factors, first, g, strict=True)}
            inner = sum(each.values())  # what modules share is in it once
            second = torch.autograd.grad(inner, factors)
            hg = [a + b for a, b in zip(hg, second, strict=True)]
        hg = distributed.sum_tensors(hg)
        # S = sum A o (H g)_A + sum B o (H g)_B
        terms = [(p.detach() * h).sum().item() for p, h in zip(factors, hg, strict=True)]
        return {name: sum(values) for name, values in by_module(layers, terms).items()}


def fisher(model, batches):
    """FISHER: the squared first-order change of each example's loss (arXiv 1801.05787).

    n counts examples, k the r channels of A x. Channel k of the pair is h_k = A_k . x. The sum over
    tokens of h_k dL_n/dh_k is A_k . dL_n/dA_k: the change of example n's loss, to first order, when
    the channel is removed. At B = 0: exactly 0, since dL_n/dA = 0.

    deviates: zero-cost-nas takes the output's second axis for the channels, which in a transformer
    is time.
    """
    count = sum(len(batch["labels"]) for batch in batches)
    with scoring(model) as layers:
        for name, layer in layers.items():
            if "lora_A" not in layer.factors():
                raise ValueError(f"fisher needs a lora_A that trains: {name} has none")
        factors = [layer.lora_A for layer in layers.values()]
        totals = [0.0] * len(factors)
        examples = [
            {k: v[i : i + 1] for k, v in b.items()}
            for b in batches
            for i in range(len(b["labels"]))
        ]
        for example, once in distributed.shares(examples):
            gradients = torch.autograd.grad(model(**example).loss, factors)
            for j, (a, g) in enumerate(zip(factors, gradients, strict=True)):
                # sum_k (A_k . dL_n/dA_k)^2     (r, in) -> (r,) -> number
                totals[j] += once * (a * g).sum(1).square().sum().item()
        totals = distributed.sum_numbers(totals)
        # S = 1/2 mean_n sum_k (A_k . dL_n/dA_k)^2
        return {name: total / 2 / count for name, total in zip(layers, totals, strict=True)}


@torch.no_grad()
def accuracy(model, batches):
    """The fraction of all examples of all batches whose class is right."""
    hits = 0
    for batch, once in distributed.shares(batches):
        hits += once * (model(**batch).logits.argmax(-1) == batch["labels"]).sum().item()
    [hits] = distributed.sum_numbers([hits])
    return hits / sum(len(batch["labels"]) for batch in batches)


def smallest_alpha(measure, least):
    """Binary search for the smallest a in 0 … 10 with measure(a / 10) >= least, as released.

    It is the smallest where measure rises with a; accuracy need not, and the search does not look.
    """
    low, high = 0, 10
    while low < high:
        middle = (low + high) // 2
        if measure(middle / 10) >= least:
            high = middle
        else:
            low = middle + 1
    return float(low)


def alpha_test(model, batches, whole_layer=False):
    """ALPHA-TEST: how far can a module's branch be turned down? (released code, alpha_test)

    S is 10 times the smallest a in 0, 0.1, …, 1 with which a s B A, in place of s B A, keeps 0.99
    of the accuracy. At B = 0: exactly 0, since the branch does nothing.

    deviates: scored on training batches, where the released dynamic code mixes in the validation
    items that results are reported on; and a scales the low-rank branch everywhere (released: of
    LoRA modules the whole layer, which is alpha_test_released).
    """
    if model.config.num_labels == 1 or model.config.head == "lm":
        raise ValueError("alpha_test needs accuracy: a classification task with two labels or more")
    scores = {}
    with scoring(model) as layers:
        least = (1 - ALPHA_TOLERANCE) * accuracy(model, batches)
        for name, layer in layers.items():
            scaling = layer.scaling

            def measure(a, layer=layer, scaling=scaling):
                whole = whole_layer and isinstance(layer.base, nn.Linear)
                layer.scaling = scaling if whole else a * scaling
                hook = layer.register_forward_hook(lambda _m, _x, h: a * h if whole else h)
                try:
                    return accuracy(model, batches)
                finally:
                    hook.remove()
                    layer.scaling = scaling

            scores[name] = smallest_alpha(measure, least)
    return scores


# ------------------------------------------------------------------------------------ slot variants


def slot_gradients(model, batches):
    """{name: (W, dL/dW)} of the dense matrix in each place: the frozen weight, identity or zero.

    Both are (out, in). A shortcut has no matrix; while it is scored, its base is a Linear that
    computes the same, up to rounding on a base in bfloat16.
    """
    with scoring(model) as layers:
        bases = {name: layer.base for name, layer in layers.items()}
        try:
            for name, layer in layers.items():
                for factor in layer.factors().values():
                    factor.requires_grad_(False)
                if not isinstance(layer.base, nn.Linear):
                    sizes = (layer.in_features, layer.out_features)
                    dense = nn.utils.skip_init(nn.Linear, *sizes, bias=False)  # draws nothing
                    residual = name.rpartition(".")[2] in RESIDUALS
                    eye = torch.eye(layer.out_features, layer.in_features)
                    dense.weight = nn.Parameter((eye * residual).to(model.word_embeddings.weight))
                    layer.base = dense
            weights = [layer.base.weight.requires_grad_(True) for layer in layers.values()]
            gradients = mean_gradients(model, batches, weights)
            weights = [w.detach() for w in weights]
            return dict(zip(layers, zip(weights, gradients, strict=True), strict=True))
        finally:
            for name, layer in layers.items():
                layer.base = bases[name]


def grad_norm_slot(model, batches):
    """GRAD-NORM of the place itself: no luck with A, no factor alpha / r, and not zero at B = 0.

    E ||dL/dB||_F^2 = s^2 r / (3 in) ||dL/dW||_F^2 over draws of A, at B = 0: this is what grad_norm
    estimates.
    """
    # S = ||dL/dW||_F
    return {name: g.norm().item() for name, (_, g) in slot_gradients(model, batches).items()}


def snip_slot(model, batches):
    """SNIP of the place itself.

    W is the identity for a residual: the sum of |diagonal of G|. It is zero for a cross-layer
    shortcut, which this score therefore never prefers: grad_norm_slot can.
    """
    slots = slot_gradients(model, batches)
    # S = sum |W o dL/dW|
    return {name: (w * g).abs().sum().item() for name, (w, g) in slots.items()}


# ------------------------------------------------------------- as released; not for a first reading


def synflow_released(model, batches):
    """SYNFLOW as the released code computes it, in the model's own precision.

    |net| keeps its LayerNorm and softmax; ones stand for the word embeddings; mask and labels are
    those of the first batch; the loss stands for R. At B = 0: exactly 0.

    deviates: reads the last real token (BERT: the first), where the released code, given embeddings
    instead of ids, reads position -1, mostly padding; and batches[0] of train.py has the shortest
    of the scored examples, that of the released code the first of the training set.
    """
    batch = {k: v for k, v in batches[0].items() if k != "input_ids"}
    weight = model.word_embeddings.weight
    ones = weight.new_ones(*batch["attention_mask"].shape, weight.shape[1])  # (b, t, embed_dim)
    return flow(absolute_copy(model), lambda m: m(None, inputs_embeds=ones, **batch).loss)


def alpha_test_released(model, batches):
    """alpha_test with a on the whole output of a linear layer, W x + b included, as released."""
    return alpha_test(model, batches, whole_layer=True)


PROXIES = {
    "constant": constant,
    "grad_norm": grad_norm,
    "snip": snip,
    "synflow": synflow,
    "synflow_released": synflow_released,
    "grasp": grasp,
    "fisher": fisher,
    "alpha_test": alpha_test,
    "alpha_test_released": alpha_test_released,
    "grad_norm_slot": grad_norm_slot,
    "snip_slot": snip_slot,
}
