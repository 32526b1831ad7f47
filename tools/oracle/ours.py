"""The interface of the oracle, implemented by this repository: what a candidate may define.

A candidate is a Python file with any subset of these functions, or with functions that raise
NotImplementedError for what they do not do. Tensors come in float64 or float32, and are not to be
changed. Names are those of the Hugging Face model: weights["bert.encoder.layer.0.…weight"],
adapters["bert.encoder.layer.0.attention.self.query"] = {"lora_A": (r, in), "lora_B": (out, r),
"lora_alpha": number}; shortcuts sit at "bert.encoder.layer.0.residual_1" and so on (README). config
is the content of config.json. scaling = lora_alpha / r everywhere.

What this file does not do: compare (oracle.py), choose inputs (oracle_cases.py).
"""

import copy

import torch
from torch import nn

import allocate
import lora
import proxies
from delta_lora import DeltaLoRA
from model import Config, Transformer
from support import hf_folder
from tools.peft.writing import full_path

# ----------------------------------------------------------------------------------- one LoRA layer


def layer_of(weight, bias, lora_A, lora_B, lora_alpha, transposed):
    """A LoRALayer; transposed: the weight is stored (in, out), as GPT-2's Conv1D does."""
    weight = weight.T if transposed else weight  # (out, in)
    base = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], dtype=weight.dtype)
    base.weight, base.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
    layer = lora.LoRALayer(base, weight.shape[1], weight.shape[0], len(lora_A), lora_alpha)
    layer.lora_A, layer.lora_B = nn.Parameter(lora_A.clone()), nn.Parameter(lora_B.clone())
    base.requires_grad_(False)
    return layer


def lora_forward(x, weight, bias, lora_A, lora_B, lora_alpha, transposed):
    """W x + b + scaling B A x: (n, in) -> (n, out)."""
    return layer_of(weight, bias, lora_A, lora_B, lora_alpha, transposed)(x).detach()


def lora_backward(x, weight, bias, lora_A, lora_B, lora_alpha, transposed, grad):
    """Given dL/dy (n, out): {"x": dL/dx, "lora_A": dL/dA, "lora_B": dL/dB}."""
    layer, x = layer_of(weight, bias, lora_A, lora_B, lora_alpha, transposed), x.clone()
    wanted = {"x": x.requires_grad_(True), "lora_A": layer.lora_A, "lora_B": layer.lora_B}
    gradients = torch.autograd.grad(layer(x), list(wanted.values()), grad)
    return dict(zip(wanted, gradients, strict=True))


def merge(weight, lora_A, lora_B, lora_alpha, transposed):
    """The weight that alone computes the same, stored as it came."""
    bias = weight.new_zeros(len(lora_B))
    layer = layer_of(weight, bias, lora_A, lora_B, lora_alpha, transposed)
    merged = (layer.base.weight + layer.delta_w()).detach()
    return merged.T if transposed else merged


# ------------------------------------------------------------------------------ a small transformer


def build(config, weights, adapters):
    """Our model from Hugging Face names: (model, {our name: full path})."""
    c = Config.from_hf(config, num_labels=config["num_labels"])
    with torch.device("meta"):
        model = Transformer(c)
    state, _ = hf_folder.convert(weights, c, model.state_dict(), model.head)
    model.load_state_dict(state, assign=True)
    model.to(next(iter(weights.values())).dtype)
    paths = {}
    for i in range(c.num_layers):
        for place in lora.LINEARS + lora.RESIDUALS + lora.CROSS:
            name = f"layers.{i}.{place}"
            if full_path(c.family, name) in adapters:
                paths[name] = full_path(c.family, name)
    targets = dict.fromkeys(n.rpartition(".")[2] for n in paths if not allocate.is_shortcut(n))
    shortcuts = dict.fromkeys(n.rpartition(".")[2] for n in paths if allocate.is_shortcut(n))
    lora.inject(model, tuple(targets), r=1, shortcuts=tuple(shortcuts))
    for name, layer in lora.adapters(model).items():
        given = adapters[paths[name]]
        layer.lora_A = nn.Parameter(given["lora_A"].clone())
        layer.lora_B = nn.Parameter(given["lora_B"].clone())
        layer.r, layer.lora_alpha = len(layer.lora_A), given["lora_alpha"]
        layer.scaling = layer.lora_alpha / layer.r
    lora.mark_trainable(model)
    return model.eval(), paths


def logits(config, weights, adapters, batch):
    """(b, num_labels) of a batch: input_ids, attention_mask, labels, token_type_ids (BERT)."""
    model, _ = build(config, weights, adapters)
    return model(**batch).logits.detach()


def scores(proxy, config, weights, adapters, batches):
    """{full path: score} over all batches, by a proxy of proxies.py."""
    model, paths = build(config, weights, adapters)
    found = proxies.PROXIES[proxy](model, batches)
    return {paths[name]: value for name, value in found.items()}


def rank_scores(proxy, config, weights, adapters, batches):
    """{full path: [score of row k of A with column k of B]}."""
    model, paths = build(config, weights, adapters)
    found = proxies.score_ranks(proxy, model, batches)
    return {paths[name]: values for name, values in found.items()}


# --------------------------------------------------------------------------------------- allocation


def keep_top(scores, keep, together):
    """The names that are on; names that end in residual_1 … shortcut_ffn are shortcuts."""
    return allocate.keep_top(scores, keep, together)


def within_budget(scores, costs, budget):
    """The best set of names whose costs fit; ValueError where none does."""
    return allocate.within_budget(scores, costs, budget)


# ----------------------------------------------------------------------------------------- training


def delta_lora(weight, lora_A, lora_B, lora_alpha, x, y, ratio, start, steps, adamw):
    """Delta-LoRA on L = mean (W x + scaling B A x - y)^2, A and B by AdamW (adamw: its arguments).

    Returns:
        for each step a dict: weight, lora_A, lora_B, and for A and B exp_avg_… and exp_avg_sq_….
    """
    layer = layer_of(weight, weight.new_zeros(len(weight)), lora_A, lora_B, lora_alpha, False)
    optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], **adamw)
    holder = nn.Module()  # what lora.adapters looks through
    holder.layers = nn.ModuleList([nn.Module()])
    for place in lora.LINEARS + lora.RESIDUALS + lora.CROSS:
        setattr(holder.layers[0], place, layer if place == "q_proj" else None)
    delta, result = DeltaLoRA(holder, ratio, start), []
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


def train(config, weights, adapters, batches, settings):
    """A short run of dynamic HeteroLoRA, with Delta-LoRA: every step takes the next batch.

    Before step 0, every, 2 every, … all modules are scored by GRAD-NORM on the first score_batches
    batches, and keep_top(keep, together) decides what is on; what is off gets no gradient and no
    step, and keeps its moments. AdamW on A, B and the head; W moves as in delta_lora.

    Args:
        settings: every, score_batches, keep, delta_ratio, delta_start, adamw.

    Returns:
        {"losses": [...], "on": [[full path, …] for each decision], "adapters": {full path:
        {"lora_A", "lora_B"}}, "weights": {full path of each adapted layer: W}}.
    """
    model, paths = build(config, weights, adapters)
    layers, s = lora.adapters(model), settings
    optimizer = torch.optim.AdamW(lora.trainable(model).values(), **s["adamw"])
    delta, losses, on = DeltaLoRA(model, s["delta_ratio"], s["delta_start"]), [], []
    for step, batch in enumerate(batches):
        if step % s["every"] == 0:
            found = proxies.grad_norm(model, batches[: s["score_batches"]])
            chosen = allocate.keep_top(found, s["keep"])
            for name, layer in layers.items():
                layer.enabled = name in chosen
            on.append(sorted(paths[name] for name in chosen))
        loss = model(**batch).loss
        loss.backward()
        delta.before_step()
        optimizer.step()
        delta.after_step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    pairs = {
        paths[n]: {"lora_A": a.lora_A.detach(), "lora_B": a.lora_B.detach()}
        for n, a in layers.items()
    }
    linear = {n: a for n, a in layers.items() if isinstance(a.base, nn.Linear)}
    moved = {paths[n]: a.base.weight.detach() for n, a in linear.items()}
    return copy.deepcopy({"losses": losses, "on": on, "adapters": pairs, "weights": moved})
