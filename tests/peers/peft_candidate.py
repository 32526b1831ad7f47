"""PEFT and transformers as a candidate for the oracle: LoRA and DoRA layers, logits, proxies.

    python -m tools.oracle check --candidate tests/peers/peft_candidate.py

The proxies are those of zero-cost-nas (foresight/pruners), written against PEFT's lora_A and lora_B
as ordinary nn.Linear layers: gradients of the loss, |theta * g| for snip, Hessian-vector products
for grasp. What PEFT has no word for (shortcuts, allocation, Delta-LoRA) is not offered.
"""

import peft
import torch
import transformers
from peft.tuners.lora import Linear
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.pytorch_utils import Conv1D

ATTENTION = {"attn_implementation": "sdpa"}  # OPT's eager attention computes in float32


def peft_layer(weight, bias, lora_A, lora_B, lora_alpha, transposed, **more):
    """PEFT's own layer around nn.Linear, or around transformers' Conv1D."""
    inner, outer = (weight.shape) if transposed else weight.T.shape
    base = Conv1D(outer, inner) if transposed else torch.nn.Linear(inner, outer)
    base = base.to(weight.dtype)
    base.weight.data.copy_(weight)
    base.bias.data.copy_(bias)
    how = {"r": len(lora_A), "lora_alpha": lora_alpha, "fan_in_fan_out": transposed}
    config = peft.LoraConfig(**how, **more)
    layer = Linear(
        base,
        "default",
        config,
        r=len(lora_A),
        lora_alpha=lora_alpha,
        fan_in_fan_out=transposed,
        is_target_conv_1d_layer=transposed,
    )
    layer.lora_A.default.weight.data = lora_A.clone()
    layer.lora_B.default.weight.data = lora_B.clone()
    return layer


def lora_forward(x, weight, bias, lora_A, lora_B, lora_alpha, transposed):
    return peft_layer(weight, bias, lora_A, lora_B, lora_alpha, transposed)(x).detach()


def lora_backward(x, weight, bias, lora_A, lora_B, lora_alpha, transposed, grad):
    layer = peft_layer(weight, bias, lora_A, lora_B, lora_alpha, transposed)
    x = x.clone().requires_grad_(True)
    layer(x).backward(grad)
    a, b = layer.lora_A.default.weight.grad, layer.lora_B.default.weight.grad
    return {"x": x.grad, "lora_A": a, "lora_B": b}


def merge(weight, lora_A, lora_B, lora_alpha, transposed):
    bias = weight.new_zeros(len(lora_B))
    layer = peft_layer(weight, bias, lora_A, lora_B, lora_alpha, transposed)
    layer.merge()
    return layer.get_base_layer().weight.detach()


def dora(x, weight, bias, lora_A, lora_B, lora_magnitude, lora_alpha, grad):
    layer = peft_layer(weight, bias, lora_A, lora_B, lora_alpha, False, use_dora=True)
    magnitude = layer.lora_magnitude_vector.default.weight
    magnitude.data = lora_magnitude.clone()
    x = x.clone().requires_grad_(True)
    y = layer(x)
    y.backward(grad)
    pair = {k: getattr(layer, k).default.weight.grad for k in ("lora_A", "lora_B")}
    return {"y": y.detach(), "x": x.grad, **pair, "lora_magnitude": magnitude.grad}


def build(config, weights, adapters):
    """transformers' model with PEFT's adapters: (model, {full path: PEFT's layer})."""
    if any("residual" in path or "shortcut" in path for path in adapters):
        raise NotImplementedError
    kind = {"bert": transformers.BertConfig, "opt": transformers.OPTConfig}[config["model_type"]]
    config = kind(**config)
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_config(config, **ATTENTION).to(next(iter(weights.values())).dtype)
    missing = model.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys
    assert all("position_ids" in name for name in missing.missing_keys)
    alphas = {f"^{path}": a["lora_alpha"] for path, a in adapters.items()}
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=list(adapters), alpha_pattern=alphas)
    )
    modules = dict(model.base_model.model.named_modules())
    layers = {path: modules[path] for path in adapters}
    for path, layer in layers.items():
        layer.lora_A.default.weight.data = adapters[path]["lora_A"].clone()
        layer.lora_B.default.weight.data = adapters[path]["lora_B"].clone()
    return model.eval(), layers


def logits(config, weights, adapters, batch):
    model, _ = build(config, weights, adapters)
    return model(**batch).logits.detach()


def scores(proxy, config, weights, adapters, batches):
    if proxy not in ("grad_norm", "snip", "grasp", "constant"):
        raise NotImplementedError
    model, layers = build(config, weights, adapters)
    if proxy == "constant":
        return dict.fromkeys(layers, 1.0)
    count = sum(len(b["labels"]) for b in batches)
    with sdpa_kernel(SDPBackend.MATH):  # the one with a second derivative
        loss = sum(model(**b).loss * len(b["labels"]) for b in batches) / count
    thetas = [(x.lora_A.default.weight, x.lora_B.default.weight) for x in layers.values()]
    flat = [theta for pair in thetas for theta in pair]
    gradients = torch.autograd.grad(loss, flat, create_graph=True)
    if proxy == "grasp":
        product = sum((g.detach() * g).sum() for g in gradients)
        hg = torch.autograd.grad(product, flat)
        parts = [(theta * h).sum() for theta, h in zip(flat, hg, strict=True)]
    elif proxy == "snip":
        parts = [(theta * g).abs().sum() for theta, g in zip(flat, gradients, strict=True)]
    else:
        parts = [g.norm() for g in gradients]
    sums = [(a + b).item() for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return dict(zip(layers, sums, strict=True))
