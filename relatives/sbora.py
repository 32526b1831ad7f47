"""SBoRA: one factor is r rows of the identity (arXiv 2407.05413).

    name       | symbol | shape
    lora_index | S      | (r,) integers, distinct, drawn; frozen
    lora_A     | A      | (r, in)   FA: e_S, the rows S of the identity, never built to multiply
    lora_B     | B      | (out, r)  FB: the columns S of the identity, likewise

    --adapter | trained    | branch              | what changes of W
    sbora_fa  | B, from 0  | scaling * B x[S]    | columns S
    sbora_fb  | A, from 0  | scaling * A x at S  | rows S

Training B (or A) is training those columns (rows) themselves: under SGD with the learning rate
times scaling^2. One gathers where LoRA multiplies, and the frozen factor is r integers.

deviates: the released code draws S from Python's global generator; here from the module's own.

What this file does not do: choose S by anything but chance; FB draws r of the outputs. In
adapter files the identity's rows are written out, so that any reader of LoRA can load it.
"""

import torch
import torch.nn.functional as F
from torch import nn

from lora import LoRALayer


def distinct(n, r, generator):
    """r distinct indices below n, sorted."""
    return torch.randperm(n, generator=generator)[:r].sort().values  # (r,)


class SBoRAFA(LoRALayer):
    """LoRALayer whose lora_A is r rows of the identity. Args and errors as LoRALayer."""

    def __init__(
        self, base, in_features, out_features, r=8, lora_alpha=16, lora_dropout=0.0, generator=None
    ):
        super().__init__(base, in_features, out_features, r, lora_alpha, lora_dropout, generator)
        del self.lora_A
        self.register_buffer("lora_index", distinct(in_features, r, generator))

    def factors(self):
        return {"lora_B": self.lora_B}

    def branch(self):
        A = F.one_hot(self.lora_index, self.in_features).to(self.lora_B)  # (r, in)
        return A, self.lora_B if self.enabled else self.lora_B.detach()

    def forward(self, x):
        """(…, in) -> (…, out)."""
        if self.merged or not self.in_forward:
            return self.base(x)
        B = self.lora_B if self.enabled else self.lora_B.detach()
        h = F.dropout(x, self.lora_dropout, self.training) if self.lora_dropout else x
        # h = base(x) + scaling * B x[S]
        return self.base(x) + F.linear(h[..., self.lora_index], self.scaling * B)  # (b, t, out)


class SBoRAFB(LoRALayer):
    """LoRALayer whose lora_B is r columns of the identity. Args and errors as LoRALayer."""

    def __init__(
        self, base, in_features, out_features, r=8, lora_alpha=16, lora_dropout=0.0, generator=None
    ):
        super().__init__(base, in_features, out_features, r, lora_alpha, lora_dropout, generator)
        del self.lora_B
        self.lora_A = nn.Parameter(torch.zeros_like(self.lora_A))  # (r, in)
        self.register_buffer("lora_index", distinct(out_features, r, generator))

    def factors(self):
        return {"lora_A": self.lora_A}

    def from_zero(self):
        return self.lora_A  # (r, in)

    def branch(self):
        B = F.one_hot(self.lora_index, self.out_features).to(self.lora_A).T  # (out, r)
        return self.lora_A if self.enabled else self.lora_A.detach(), B

    def forward(self, x):
        """(…, in) -> (…, out)."""
        if self.merged or not self.in_forward:
            return self.base(x)
        A = self.lora_A if self.enabled else self.lora_A.detach()
        h = F.dropout(x, self.lora_dropout, self.training) if self.lora_dropout else x
        # h = base(x), and scaling * A x added to the outputs S
        return self.base(x).index_add(-1, self.lora_index, F.linear(h, self.scaling * A))
