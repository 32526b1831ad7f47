"""AdaLoRA's module: triplets of a column of B, a number, a row of A (arXiv 2303.10512, Eq. 3, 4).

    ΔW = alpha / r * B diag(E) A,      as a singular value decomposition
    L + gamma * mean of ||A A^T - I||_F and ||B^T B - I||_F      holds A and B near orthogonal

    name   | symbol | shape
    lora_A | A      | (r, in)    N(0, 0.02^2) at the start
    lora_E | E      | (r, 1)     zero at the start
    lora_B | B      | (out, r)   N(0, 0.02^2) at the start
    GAMMA  | gamma  | 0.1

deviates: the paper squares the norms of the penalty and sums them; its code, whose gamma this is,
takes their mean. The scale of the published code has r + 1e-5.

What this file does not do: mask E (adalora.py).
"""

import torch
from torch import nn

from lora import LoRALayer

GAMMA = 0.1


class AdaLoRALayer(LoRALayer):
    """ΔW = scaling * B diag(E) A; arguments as in LoRALayer, of whose A the generator is used."""

    def __init__(
        self, base, in_features, out_features, r=8, lora_alpha=16, lora_dropout=0.0, generator=None
    ):
        super().__init__(base, in_features, out_features, r, lora_alpha, lora_dropout, generator)
        with torch.no_grad():
            for factor in (self.lora_A, self.lora_B):  # N(0, 0.02^2)
                noise = torch.randn(factor.shape, generator=generator, dtype=torch.float32)
                factor.copy_(0.02 * noise)
        self.lora_E = nn.Parameter(self.lora_A.new_zeros(r, 1))

    def branch(self):
        """(diag(E) A, B) as the forward pass takes them."""
        A, B = super().branch()
        return (self.lora_E if self.enabled else self.lora_E.detach()) * A, B

    def factors(self):
        return {"lora_A": self.lora_A, "lora_E": self.lora_E, "lora_B": self.lora_B}

    def from_zero(self):
        return self.lora_E  # (r, 1)

    def pair(self):
        """(A, B) with E in A, of the ranks that have one: what the module exports as."""
        A, B = super().pair()
        kept = self.lora_E.detach()[:, 0] != 0  # (r,)
        return A[kept], B[:, kept]


@torch.no_grad()
def add_penalty(layers):
    """Add the penalty's slope to the gradients of A and B.

    Args:
        layers: all AdaLoRALayers of a model; their lora_A and lora_B have gradients.
    """
    for layer in layers:
        for factor, rows in ((layer.lora_A, layer.lora_A), (layer.lora_B, layer.lora_B.T)):
            off = rows @ rows.T - torch.eye(layer.r).to(rows)  # (r, r)
            # d ||Q Q^T - I||_F / dQ = 2 (Q Q^T - I) Q / ||Q Q^T - I||_F
            slope = 2 * off @ rows / off.norm().clamp(min=1e-12)
            slope = slope if factor is rows else slope.T
            factor.grad += GAMMA / (2 * len(layers)) * slope
