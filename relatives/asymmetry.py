"""Asymmetry: A is frozen with orthonormal rows, B alone trains (arXiv 2402.16842).

    name   | symbol | shape
    lora_A | A      | (r, in)   A A^T = I, drawn; not trained, not stored in a checkpoint
    lora_B | B      | (out, r)  starts at zero; trained

The paper's reason: A picks features of the input, which a random A does nearly as well as a trained
one, B makes the output of them. With A fixed the layer is linear in B, of which r out parameters
train, and all that B can reach is the row space of A.

deviates: the released code takes the first r columns of V from the SVD of a uniform matrix as large
as W. Here the rows come from a QR of LoRA's own draw, (r, in): no less random, without the large
SVD. What train.py redraws from (seed, name) needs no place in a checkpoint.

What this file does not do: the paper's other choices of A (of W's singular vectors), or B frozen
and A trained.
"""

import torch
from torch import nn

from lora import LoRALayer


class Asymmetry(LoRALayer):
    """LoRALayer with lora_A frozen, its rows orthonormal. Args and errors as LoRALayer."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # A^T = Q of the QR decomposition of the draw: A A^T = Q^T Q = I
        q, _ = torch.linalg.qr(self.lora_A.detach().T.double())  # (in, r)
        A = q.T.contiguous().to(self.lora_A)  # (r, in)
        self.lora_A = nn.Parameter(A, requires_grad=False)

    def factors(self):
        return {"lora_B": self.lora_B}
