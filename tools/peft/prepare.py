"""Places for our shortcuts in a transformers model of the BERT kind, so that PEFT can adapt them.

A stock model has no module where HeteroLoRA's shortcuts sit. After prepare() it has, and PEFT
loads what `python -m tools.peft export --keep-shortcuts` wrote:

    residual_1, residual_2       a frozen nn.Linear that is the identity
    shortcut_sa, shortcut_ffn    a frozen nn.Linear that is zero

The model computes what it did before.

What this file does not do: other families, --shortcut-norm reuse.
"""

import torch
from torch import nn

import lora


def prepare(model, shortcut_names):
    """Give the model a module for each name, in place.

    Args:
        model: a transformers model with bert.encoder.layer or roberta.encoder.layer.
        shortcut_names: full paths such as "bert.encoder.layer.0.residual_1".

    Returns:
        the model.

    Raises:
        ValueError: a path that is no such place.
    """
    wanted = {}
    for path in shortcut_names:
        parent, _, place = path.rpartition(".")
        if ".encoder.layer." not in path or place not in lora.RESIDUALS + lora.CROSS:
            raise ValueError(f"{path} is no place for a shortcut in a BERT or RoBERTa model")
        wanted.setdefault(parent, []).append(place)
    previous = {}  # the FFN input of the layer before, during a forward pass
    layers = model.get_submodule(next(iter(wanted)).rpartition(".")[0])
    for i, layer in enumerate(layers):
        for place in wanted.get(f"{model.base_model_prefix}.encoder.layer.{i}", ()):
            d = model.config.hidden_size
            linear = nn.Linear(d, d, bias=False).to(layer.output.dense.weight).requires_grad_(False)
            matrix = torch.eye(d) if place in lora.RESIDUALS else torch.zeros(d, d)
            linear.weight.data.copy_(matrix)  # (d, d)
            setattr(layer, place, linear)
        add_hooks(layer, previous)
    return model


def add_hooks(layer, previous):
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
