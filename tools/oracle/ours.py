"""The interface of the oracle, with this repository's own answers.

A candidate is a Python file that defines any of these functions, with the same arguments and the
same results. Nothing else of it is looked at. A function that is absent, or that raises
NotImplementedError, is reported as "not offered".

    tensors       torch, floating-point ones in float64 and then in float32; a candidate works in
                  the precision that it is given, and may change what it is given
    scaling       lora_alpha / r everywhere, r = lora_A.shape[-2]
    lora_A        (r, in)
    lora_B        (out, r)
    weight        (out, in), as torch.nn.Linear stores it, except where `transposed` says otherwise
    a score       a Python number, or a tensor of one element; larger = keep

The functions come in six groups. A candidate takes what it has.

ONE LAYER. lora_forward, lora_backward and merge: y = W x + b + scaling B A x.

ALLOCATION. keep_top and within_budget take names and numbers and return a set of names.

A SMALL NETWORK. grad_norm, snip, snip_ranks, synflow, short_run; delta_step, delta_lora and
delta_adapter. `layers` is a list of dicts with weight, lora_A, lora_B, lora_alpha; there are no
biases:

    h = x;  for each layer: h = W h + scaling B A h, then ReLU, except after the last
    logits = h (n, classes);  L = mean over the examples of the cross-entropy

`batches` is a list of dicts with x (n, in) and labels (n,); n differs from batch to batch. Scores
come from L, the mean over all examples of all batches. Results are lists in the order of layers.

A TRANSFORMER. logits, scores, rank_scores and train: BERT or OPT for sequence classification.
config is the content of config.json as transformers writes it, weights are all tensors under their
Hugging Face names ("bert.encoder.layer.0.output.dense.weight"), and adapters holds the pairs by the
path of the layer: adapters["bert.encoder.layer.0.attention.self.query"] = {"lora_A", "lora_B",
"lora_alpha"}. All else is as in transformers' BertForSequenceClassification and
OPTForSequenceClassification, dropout is 0. HeteroLoRA's shortcuts are pairs too, at the path of
their block ("bert.encoder.layer.0.residual_1"); with P(x) = scaling B A x and x the input of the
block,

    BERT   u = LayerNorm(x + P_residual_1(x) + attention(x)) + P_shortcut_ffn(u of the block before)
           y = LayerNorm(u + P_residual_2(u) + FFN(u)) + P_shortcut_sa(x)
    OPT    u = x + P_residual_1(x) + attention(LayerNorm(x)) + P_shortcut_ffn(u of the block before)
           y = u + P_residual_2(u) + FFN(LayerNorm(u)) + P_shortcut_sa(x)

y is the output of the block. A pair that is absent contributes nothing; the first block has no
shortcut_ffn. A batch is a dict with input_ids, attention_mask (padding on the right), labels and,
for BERT, token_type_ids.

RELATED METHODS. dora, asymmetry, lora_xs, prolora, sbora_fa, sbora_fb, adalora, tied, condlora,
cora and reslora: other forms of the branch. One layer, or one place in several blocks, gets an
input x and grad = dL/dy, and returns its output and the gradients of x and of what trains, each
under the name of the argument. weight_change: what each of them adds to W.

RULES AND BUDGETS. loraplus, riemannian, lora_pro and lora_rite: steps of an optimizer for one pair,
with the gradients given. riemannian_step: one without moments. adalora_schedule, adalora_scores,
adalora_penalty and adalora_keep; alora_importance and alora_exchange.

What this file does not do: compare (check.py), choose inputs (cases.py).
"""

import copy

import torch
from torch import nn

import allocate
import lora
import proxies
from delta_lora import DeltaLoRA
from model import Config, Transformer
from relatives.rank_scores import part_scores
from support import hf_folder
from tools.oracle.network import PLACES, Network, layer_of
from tools.oracle.ours_adapters import (  # noqa: F401  part of the interface
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
from tools.oracle.ours_rules import (  # noqa: F401  part of the interface
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
from tools.peft.writing import full_path

# ----------------------------------------------------------------------------------- one LoRA layer


def lora_forward(x, weight, bias, lora_A, lora_B, lora_alpha, transposed):
    """y = W x + b + scaling B A x, row by row: x (n, in) -> (n, out).

    transposed: the weight comes as (in, out), as GPT-2's Conv1D stores it; all else is the same.
    """
    return layer_of(weight, bias, lora_A, lora_B, lora_alpha, transposed)(x).detach()


def lora_backward(x, weight, bias, lora_A, lora_B, lora_alpha, transposed, grad):
    """The gradients of lora_forward, given grad = dL/dy (n, out).

    Returns:
        {"x": dL/dx (n, in), "lora_A": dL/dA (r, in), "lora_B": dL/dB (out, r)}.
    """
    layer, x = layer_of(weight, bias, lora_A, lora_B, lora_alpha, transposed), x.clone()
    wanted = {"x": x.requires_grad_(True), "lora_A": layer.lora_A, "lora_B": layer.lora_B}
    gradients = torch.autograd.grad(layer(x), list(wanted.values()), grad)
    return dict(zip(wanted, gradients, strict=True))


def merge(weight, lora_A, lora_B, lora_alpha, transposed):
    """The one weight that computes what W and the pair do; stored as W came, see transposed."""
    layer = layer_of(weight, None, lora_A, lora_B, lora_alpha, transposed)
    merged = (layer.base.weight + layer.delta_w()).detach()
    return merged.T if transposed else merged


# --------------------------------------------------------------------------------------- allocation


def keep_top(scores, keep, together):
    """The best floor(keep n_l) + round(keep n_s) names of n_l LoRA modules and n_s shortcuts.

    A name that ends in residual_1, residual_2, shortcut_sa or shortcut_ffn is a shortcut. round is
    Python's: halves to even. Between equal scores any choice is right.

    Args:
        scores: dict name -> number, which may be negative; larger = keep.
        keep: number, 0 < keep <= 1.
        together: one ranking of all; else floor(keep n_l) modules and round(keep n_s) shortcuts,
            each ranked among their own kind.

    Returns:
        set of names.

    Raises:
        ValueError: there is nothing to keep.
    """
    return allocate.keep_top(scores, keep, together)


def within_budget(scores, costs, budget):
    """The set of names with the largest sum of scores whose sum of costs is at most the budget.

    Args:
        scores: dict name -> number, which may be negative. costs: dict name -> int > 0.
        budget: int; may be met exactly.

    Returns:
        set of names; any of the best sets.

    Raises:
        ValueError: no module fits.
    """
    return allocate.within_budget(scores, costs, budget)


# ---------------------------------------------------------------------------------- a small network


def grad_norm(layers, batches):
    """GRAD-NORM: [||dL/dA||_F + ||dL/dB||_F of each layer]."""
    return list(proxies.PROXIES["grad_norm"](Network(layers), batches).values())


def snip(layers, batches):
    """SNIP: [sum |A o dL/dA| + sum |B o dL/dB| of each layer], o entry by entry."""
    return list(proxies.PROXIES["snip"](Network(layers), batches).values())


def snip_ranks(layers, batches):
    """SNIP of each rank-one part: [[sum_j |A_kj dL/dA_kj| + sum_i |B_ik dL/dB_ik| for k] by layer].

    Part k is row k of A with column k of B.
    """
    return list(part_scores("snip", Network(layers), batches).values())


def synflow(layers):
    """SYNFLOW: [sum |A o dR/dA| + sum |B o dR/dB| of each layer], without data.

    R = the sum of the network's output for an input of ones, with |W|, |A| and |B| in place of W, A
    and B (ReLU changes nothing then).
    """
    return list(proxies.PROXIES["synflow"](Network(layers), []).values())


def short_run(layers, batches, settings):
    """A run of dynamic HeteroLoRA with Delta-LoRA: step t = 0, 1, … takes batches[t].

    Before step 0, every, 2 every, … all layers, on or off, are scored by GRAD-NORM on the first
    score_batches batches, with all pairs in the forward pass. The best floor(keep n) of n layers
    are on until the next decision. A pair that is off takes no part in the forward pass, gets no
    step, no decay and no new moments, and keeps A, B and its moments, Adam's step count too, for
    when it returns.

    Then AdamW as in torch for A and B of what is on; and in every step t > delta_start
    W <- W + delta_ratio scaling (B' A' - B A) for what is on, with A, B before and A', B' after the
    step of AdamW.

    Args:
        settings: dict with every, score_batches, keep, delta_ratio, delta_start, adamw (lr,
            weight_decay, betas, eps: keyword arguments of torch.optim.AdamW).

    Returns:
        {"losses": [L of each step's batch, before the step], "on": [sorted indices of layers, one
        list a decision], "adapters": [{"lora_A", "lora_B"}], "weights": [W]}.
    """
    model = Network(layers)
    losses, decisions = run(model, batches, settings)
    order = {name: i for i, name in enumerate(lora.adapters(model))}
    pairs = list(lora.adapters(model).values())
    return {
        "losses": losses,
        "on": [sorted(order[name] for name in chosen) for chosen in decisions],
        "adapters": [pair_of(layer) for layer in pairs],
        "weights": [layer.base.weight.detach() for layer in pairs],
    }


def pair_of(layer):
    return {"lora_A": layer.lora_A.detach(), "lora_B": layer.lora_B.detach()}


def run(model, batches, settings):
    """The loop of short_run and train: (losses, [set of names that are on, one a decision])."""
    s = settings
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, **s["adamw"])
    delta, losses, decisions = DeltaLoRA(model, s["delta_ratio"], s["delta_start"]), [], []
    for step, batch in enumerate(batches):
        if step % s["every"] == 0:
            found = proxies.PROXIES["grad_norm"](model, batches[: s["score_batches"]])
            chosen = allocate.keep_top(found, s["keep"])
            lora.switch(model, chosen)
            decisions.append(chosen)
        loss = model(**batch).loss
        loss.backward()
        delta.before_step()
        optimizer.step()
        delta.after_step()
        optimizer.zero_grad(set_to_none=True)  # None, not 0: what is off gets no step
        losses.append(loss.item())
    return losses, decisions


# --------------------------------------------------------------------------------------- Delta-LoRA


def delta_layer(weight, lora_A, lora_B, lora_alpha, ratio, start):
    """(LoRALayer, DeltaLoRA) of a network of one layer."""
    pair = {"lora_A": lora_A, "lora_B": lora_B, "lora_alpha": lora_alpha}
    model = Network([{"weight": weight, **pair}])
    return model.layers[0].q_proj, DeltaLoRA(model, ratio, start)


@torch.no_grad()
def delta_step(weight, old_A, old_B, new_A, new_B, lora_alpha, ratio):
    """The new weight, W + ratio scaling (B' A' - B A): A, B are old, A', B' new."""
    layer, delta = delta_layer(weight, old_A, old_B, lora_alpha, ratio, -1)
    delta.before_step()
    layer.lora_A.copy_(new_A)
    layer.lora_B.copy_(new_B)
    delta.after_step()
    return layer.base.weight.detach()


def delta_lora(weight, lora_A, lora_B, lora_alpha, x, y, ratio, start, steps, adamw):
    """Delta-LoRA on L = the mean over all entries of (W x + scaling B A x - y)^2.

    Step t = 0, 1, … steps - 1: gradients of A and B, a step of torch.optim.AdamW(**adamw) for both,
    then W as in delta_step if t > start. x is (n, in), y (n, out).

    Returns:
        [for each step a dict: weight, lora_A, lora_B as they are after it, and AdamW's moments
        exp_avg_lora_A, exp_avg_sq_lora_A, exp_avg_lora_B, exp_avg_sq_lora_B].
    """
    layer, delta = delta_layer(weight, lora_A, lora_B, lora_alpha, ratio, start)
    optimizer, result = torch.optim.AdamW([layer.lora_A, layer.lora_B], **adamw), []
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(x) - y).square().mean().backward()
        delta.before_step()
        optimizer.step()
        delta.after_step()
        state = {"weight": layer.base.weight, "lora_A": layer.lora_A, "lora_B": layer.lora_B}
        for name in ("lora_A", "lora_B"):
            for moment in ("exp_avg", "exp_avg_sq"):
                state[f"{moment}_{name}"] = optimizer.state[getattr(layer, name)][moment]
        result.append({k: v.detach().clone() for k, v in state.items()})
    return result


@torch.no_grad()
def delta_adapter(lora_A, lora_B, lora_alpha, ratio, start):
    """A finished run of Delta-LoRA as a plain adapter of scaling 1 on the weight W_0 it began with.

    The updates of delta_step for every step t > start sum up to two products; with the pair itself
    the whole change of the layer is B' A', of rank <= 2r.

    Args:
        lora_A: (T + 1, r, in): A before the first step, after step 0, after step 1 … after step
            T - 1; lora_B: (T + 1, out, r).

    Returns:
        {"lora_A": A' (R, in), "lora_B": B' (out, R)} with R <= 2r. The product is what is compared.
    """
    weight = lora_A.new_zeros(lora_B.shape[1], lora_A.shape[2])
    layer, delta = delta_layer(weight, lora_A[0], lora_B[0], lora_alpha, ratio, start)
    for a, b in zip(lora_A[1:], lora_B[1:], strict=True):
        delta.before_step()
        layer.lora_A.copy_(a)
        layer.lora_B.copy_(b)
        delta.after_step()
    ((a, b),) = delta.export().values()
    return {"lora_A": a, "lora_B": b}


# ------------------------------------------------------------------------------------ a transformer


def build(config, weights, adapters):
    """Our model from Hugging Face names: (model, {our name: full path})."""
    c = Config.from_hf(config, num_labels=config["num_labels"])
    with torch.random.fork_rng(devices=[]):  # what is drawn here is replaced below
        model = Transformer(c)
    state, _ = hf_folder.convert(weights, c, model.state_dict(), model.head)
    model.load_state_dict(state, assign=True)
    model.to(next(iter(weights.values())).dtype)
    there = [place for place in PLACES if place != "gate_proj" or c.gated]
    names = [f"layers.{i}.{place}" for i in range(c.num_layers) for place in there]
    paths = {name: full_path(c.family, name) for name in names}
    paths = {name: path for name, path in paths.items() if path in adapters}
    places = dict.fromkeys(name.rpartition(".")[2] for name in paths)
    targets = [p for p in places if p in lora.LINEARS]
    lora.inject(model, targets, r=1, shortcuts=[p for p in places if p not in targets])
    for name, layer in lora.adapters(model).items():
        given = adapters[paths[name]]
        layer.lora_A = nn.Parameter(given["lora_A"].clone())
        layer.lora_B = nn.Parameter(given["lora_B"].clone())
        layer.r, layer.lora_alpha = len(layer.lora_A), given["lora_alpha"]
        layer.scaling = layer.lora_alpha / layer.r
    lora.mark_trainable(model)
    return model.eval(), paths


def logits(config, weights, adapters, batch):
    """(n, num_labels). BERT reads the first token through its pooler, OPT the last real token."""
    model, _ = build(config, weights, adapters)
    return model(**batch).logits.detach()


def scores(proxy, config, weights, adapters, batches):
    """{path: score} of every pair, L = the mean cross-entropy over all examples of all batches.

    Args:
        proxy: "grad_norm", "snip", "grasp", "fisher", … "what" in each case's json has the formula.
            Raise NotImplementedError for those you have not.
    """
    model, paths = build(config, weights, adapters)
    found = proxies.PROXIES[proxy](model, batches)
    return {paths[name]: value for name, value in found.items()}


def rank_scores(proxy, config, weights, adapters, batches):
    """{path: [score of row k of A with column k of B, for k = 0 … r - 1]}: "grad_norm", "snip"."""
    model, paths = build(config, weights, adapters)
    found = part_scores(proxy, model, batches)
    return {paths[name]: values for name, values in found.items()}


def train(config, weights, adapters, batches, settings):
    """short_run on a transformer.

    AdamW also trains the head (BERT: pooler and classifier, OPT: score). The choice is
    keep_top(scores, keep, together=True). W of a shortcut, the identity or zero, does not move.

    Returns:
        {"losses": [...], "on": [sorted paths, one list a decision], "adapters": {path: {"lora_A",
        "lora_B"}}, "weights": {path of each adapted linear layer: W}}.
    """
    model, paths = build(config, weights, adapters)
    losses, decisions = run(model, batches, settings)
    layers = {paths[name]: layer for name, layer in lora.adapters(model).items()}
    linear = {path: layer for path, layer in layers.items() if isinstance(layer.base, nn.Linear)}
    return {
        "losses": losses,
        "on": [sorted(paths[name] for name in chosen) for chosen in decisions],
        "adapters": {path: copy.deepcopy(pair_of(layer)) for path, layer in layers.items()},
        "weights": {path: layer.base.weight.detach().clone() for path, layer in linear.items()},
    }
