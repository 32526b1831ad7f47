"""Steps of single ranks: an optimizer moves the ranks of a module that are on, and those alone.

    name   | symbol   | shape
    row    | A_k      | (in,)   row k of lora_A, a parameter of its own to the optimizer
    column | B_k      | (out,)  column k of lora_B, likewise
    parts  |          | dict module -> [(row, column)] of all its ranks, on or off

What this file does not do: move A, B or W by itself (the optimizer, delta_lora.py), say which ranks
are on (single_ranks.py, alora.py).
"""

import torch
from torch import nn

import lora


class RankSteps:
    """Two calls around optimizer.step() that let it step single ranks: those that are on.

    To the optimizer every row of lora_A and every column of lora_B is a parameter of its own, with
    moments and a step count of its own; AdamW on a whole factor would decay and move what is off.
    before_step() hands out values and gradients of what is on, after_step() takes the values back.
    What is off gets no gradient, and the optimizer leaves it alone altogether.

    Args:
        model: model.Transformer with adapters, on its device.
    """

    def __init__(self, model):
        self.layers = lora.adapters(model)
        pairs = {id(f) for layer in self.layers.values() for f in layer.factors().values()}
        self.rest = [p for p in lora.trainable(model).values() if id(p) not in pairs]  # the head
        self.parts = {  # name -> [(row k of A (in,), column k of B (out,))]
            name: [
                (nn.Parameter(row.clone()), nn.Parameter(column.clone()))
                for row, column in zip(layer.lora_A.detach(), layer.lora_B.detach().T, strict=True)
            ]
            for name, layer in self.layers.items()
        }

    def parameters(self):
        """What an optimizer is built on: the parts, then the head; in a fixed order."""
        pairs = [pair for parts in self.parts.values() for pair in parts]
        return [*(p for pair in pairs for p in pair), *self.rest]

    def adamw(self, lr, weight_decay):
        """AdamW over parameters()."""
        return torch.optim.AdamW(self.parameters(), lr=lr, weight_decay=weight_decay, fused=True)

    def on(self):
        """(layer, k, row, column) of every part that is on."""
        return [
            (layer, k, *self.parts[name][k])
            for name, layer in self.layers.items()
            for k in range(layer.r)
            if k not in layer.ranks_off
        ]

    @torch.no_grad()
    def before_step(self):
        """Call after backward (and clipping), before optimizer.step()."""
        for layer, k, row, column in self.on():
            row.copy_(layer.lora_A[k])  # (in,)
            column.copy_(layer.lora_B[:, k])  # (out,)
            row.grad = layer.lora_A.grad[k].clone()
            column.grad = layer.lora_B.grad[:, k].clone()
        for layer in self.layers.values():  # handed on: the optimizer's zero_grad is for the parts
            layer.lora_A.grad = layer.lora_B.grad = None

    @torch.no_grad()
    def after_step(self):
        """Call after optimizer.step()."""
        for layer, k, row, column in self.on():
            layer.lora_A[k] = row
            layer.lora_B[:, k] = column
