"""What the relatives are compared with: LoRA's pairs, trained by AdamW; and the pairs themselves.

    name    | symbol   | shape
    A, B    | A, B     | (r, in), (out, r)   a pair: both train, and no other module has them
    scaling | s        | number              the module adds s B A to its weight

What this file does not do: anything new.
"""

import torch

import lora


def adamw(model, lr, weight_decay):
    """AdamW over all that trains, fused: a loop over a few dozen small tensors costs 3 % of a step.

    Args:
        model: model.Transformer with adapters. lr: learning rate. weight_decay: decoupled.
    """
    parameters = lora.trainable(model).values()
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)


def pairs(model):
    """[(A, B, scaling)] of every module, on or off, for rules about the two factors of a product.

    Raises:
        ValueError: a module does not train both, or shares one with another module.
    """
    found, seen = [], set()
    for name, layer in lora.adapters(model).items():
        factors = layer.factors()
        A, B = factors.get("lora_A"), factors.get("lora_B")
        if A is None or B is None:
            raise ValueError(f"{name} does not train a pair A and B: use --optimizer adamw")
        if seen & {id(A), id(B)}:
            raise ValueError(f"{name} shares A or B with a module: use --optimizer adamw")
        seen |= {id(A), id(B)}
        found.append((A, B, layer.scaling))
    return found


class OtherGradients(torch.optim.AdamW):
    """AdamW to which each pair's gradients are given as a rule makes them anew.

    Args:
        model: model.Transformer with adapters. lr, weight_decay: as in adamw.
        rule: function (A, B, gradient of A, gradient of B, s) -> the two gradients in their place.
    """

    def __init__(self, model, lr, weight_decay, rule):
        self.pairs, self.rule = pairs(model), rule
        parameters = lora.trainable(model).values()
        super().__init__(parameters, lr=lr, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self):
        """One step; a module that is off has no gradients, and stays as it is."""
        for A, B, scaling in self.pairs:
            if A.grad is not None:
                new_A, new_B = self.rule(A, B, A.grad, B.grad, scaling)
                # copied: the fused kernel reads memory in the order of A, whatever the strides
                A.grad.copy_(new_A)
                B.grad.copy_(new_B)
        super().step()
