"""Places for our shortcuts in a transformers model, so that PEFT can adapt them.

A stock model has no module where HeteroLoRA's shortcuts sit. After prepare() it has, and PEFT
loads what `python -m tools.peft export --keep-shortcuts` wrote:

    residual_1, residual_2       a frozen nn.Linear that is the identity
    shortcut_sa, shortcut_ffn    a frozen nn.Linear that is zero

The model computes what it did before. There are two kinds: BERT and RoBERTa, post-LN; LLaMA,
Mistral, Qwen2, Qwen3 and Gemma, pre-LN with a gate.

What this file does not do: OPT and GPT-2, --shortcut-norm reuse.
"""

import torch
from torch import nn

import lora


def prepare(model, shortcut_names):
    """Give the model a module for each name, in place.

    Args:
        model: a transformers model with a head, of one of these families.
        shortcut_names: full paths such as "bert.encoder.layer.0.residual_1" or
            "model.layers.0.residual_1".

    Returns:
        the model.

    Raises:
        ValueError: a path that is no such place.
    """
    wanted = {}
    for path in shortcut_names:
        parent, _, place = path.rpartition(".")
        stack = parent.rpartition(".")[0]
        if stack not in STACKS or place not in lora.RESIDUALS + lora.CROSS:
            raise ValueError(f"{path} is no place for a shortcut in {', '.join(STACKS)}")
        layers = [name for name, _ in model.named_modules() if name.rpartition(".")[0] == stack]
        if parent not in layers[place == "shortcut_ffn" :]:  # the first has none before it
            raise ValueError(f"{path} is no place for a shortcut in this model")
        wanted.setdefault(parent, []).append(place)
    if not wanted:
        return model
    previous = {}  # the FFN input of the layer before, during a forward pass
    d, weight = model.config.hidden_size, model.get_input_embeddings().weight
    for i, layer in enumerate(model.get_submodule(stack)):
        for place in wanted.get(f"{stack}.{i}", ()):
            linear = nn.Linear(d, d, bias=False).to(weight).requires_grad_(False)
            matrix = torch.eye(d) if place in lora.RESIDUALS else torch.zeros(d, d)
            linear.weight.data.copy_(matrix)  # (d, d)
            setattr(layer, place, linear)
        STACKS[stack](layer, previous)
    return model


def hook_post_ln(layer, previous):
    """The four places in the forward pass of one BertLayer, as in model.Block.forward, post-LN."""

    def around(place):
        return lambda _module, inputs: (inputs[0], getattr(layer, place)(inputs[1]))

    def into_ffn(_module, _inputs, output):
        x = output[0]  # (b, t, d)
        if hasattr(layer, "shortcut_ffn"):
            x = x + layer.shortcut_ffn(previous["ffn_input"])
        previous["ffn_input"] = x
        return (x, *output[1:])

    def into_next(_module, inputs, output):
        x = output[0] if isinstance(output, tuple) else output  # (b, t, d)
        x = x + layer.shortcut_sa(inputs[0])
        return (x, *output[1:]) if isinstance(output, tuple) else x

    if hasattr(layer, "residual_1"):
        layer.attention.output.register_forward_pre_hook(around("residual_1"))
    if hasattr(layer, "residual_2"):
        layer.output.register_forward_pre_hook(around("residual_2"))
    layer.attention.register_forward_hook(into_ffn)
    if hasattr(layer, "shortcut_sa"):
        layer.register_forward_hook(into_next)


def hook_pre_ln(layer, previous):
    """The four places in the forward pass of one LlamaDecoderLayer or alike, pre-LN.

    Both sums are written in the layer's own forward: x + SA(LN x). What the sub-layer gives
    gets the difference, (R x - x), which is 0 exactly where R is the identity.
    """
    seen = {}  # the inputs of the two norms

    def keep(name):
        return lambda _module, inputs: seen.update({name: inputs[0]})

    def after_attention(_module, _inputs, output):
        h, x = output[0], seen["sa_input"]  # (b, t, d)
        if hasattr(layer, "residual_1"):
            h = h + (layer.residual_1(x) - x)
        if hasattr(layer, "shortcut_ffn"):
            h = h + layer.shortcut_ffn(previous["ffn_input"])
        return (h, *output[1:])

    def after_ffn(_module, _inputs, h):
        x = previous["ffn_input"] = seen["ffn_input"]  # (b, t, d)
        if hasattr(layer, "residual_2"):
            h = h + (layer.residual_2(x) - x)
        return h + layer.shortcut_sa(seen["sa_input"]) if hasattr(layer, "shortcut_sa") else h

    layer.input_layernorm.register_forward_pre_hook(keep("sa_input"))
    layer.post_attention_layernorm.register_forward_pre_hook(keep("ffn_input"))
    layer.self_attn.register_forward_hook(after_attention)
    layer.mlp.register_forward_hook(after_ffn)


STACKS = {  # where the layers are -> how the places get into one
    "bert.encoder.layer": hook_post_ln,
    "roberta.encoder.layer": hook_post_ln,
    "model.layers": hook_pre_ln,
}
