"""Tied-LoRA: one pair for all blocks, and two small vectors of its own for each module.

Renduchintala, Konuk, Kuchaiev: Tied-LoRA (arXiv 2311.09578), the variant in which all is trained
(TL6). With A and B random and frozen, and u and v alone trained, it would be VeRA.

    name    | symbol | shape
    lora_A  | A      | (r, in)   shared by the modules of one place, over all blocks
    lora_B  | B      | (out, r)  shared likewise; zero at the start
    lora_u  | u      | (r,)      a module's own; ones at the start
    lora_v  | v      | (out,)    a module's own; ones at the start

Trainable parameters for a W of m x n in L blocks: r (m + n) once, and L (r + m).

What is shared trains while one of its modules is on, and gets the sum of their gradients. A module
that is off leaves the forward pass and its u and v wait; they are counted as stored once B has
learned, also where they are ones still. grad_norm and snip score a module by u, v
and the whole gradient of A and B, which is the same for all that share them: what tells blocks
apart is u and v.

deviates: the start, ones for u and v, is from the method's degenerate case (one block, u and v
frozen, is LoRA); the paper's own could not be read.

What this file does not do: the paper's other variants, which tie or freeze fewer or other parts.
"""

import torch
from torch import nn

from lora import LoRALayer


def by_place(layers):
    """[[module of the first block, of the next, …]] of each place, from {name: module}."""
    places = {}
    for name, layer in layers.items():
        places.setdefault(name.rpartition(".")[2], []).append(layer)
    return list(places.values())


def share_pairs(layers):
    """The modules of a place take the lora_A and lora_B of the first of them."""
    for first, *others in by_place(layers):
        for layer in others:
            layer.lora_A, layer.lora_B = first.lora_A, first.lora_B


class TiedLoRA(LoRALayer):
    """A LoRALayer whose pair is shared, scaled row by row by its own u and v.

    Arguments and errors are those of LoRALayer.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lora_u = nn.Parameter(torch.ones(self.r).to(self.lora_A))  # (r,)
        self.lora_v = nn.Parameter(torch.ones(self.out_features).to(self.lora_B))  # (out,)

    @staticmethod
    def connect(layers, seed):
        """A and B of a place are those that its module in the first block has drawn."""
        share_pairs(layers)

    def branch(self):
        # h = W x + s diag(v) B diag(u) A x
        A, B = self.lora_u[:, None] * self.lora_A, self.lora_v[:, None] * self.lora_B
        return (A, B) if self.enabled else (A.detach(), B.detach())  # (r, in), (out, r)

    def factors(self):
        own = {"lora_u": self.lora_u, "lora_v": self.lora_v}
        return {"lora_A": self.lora_A, "lora_B": self.lora_B, **own}
