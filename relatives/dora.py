"""DoRA: magnitude and direction of the weight apart (arXiv 2402.09353, Eq. 5; NVlabs/DoRA).

    name           | symbol | shape
    lora_A, lora_B | A, B   | (r, in), (out, r)  as in LoRA; they turn the rows of W
    lora_magnitude | m      | (out,)  starts at ||W||, row by row; trained
    norm           | ||V||  | (out,)  of the rows of V = W + scaling * B A; held constant

A row of W is all that reaches one output, so a row's norm is that output's magnitude. The norm is
of the current V in every forward pass, but has no gradient (section 4.3). At the start B = 0, so
m = ||V||, and the layer is its base.

deviates: the paper writes W as (in, out) by columns, which are rows here. It says nothing of
dropout; as in NVlabs and PEFT it is on the input of all that is added to the base.

What this file does not do: a pair() - the change of the weight has full rank, so adapter files
keep m. A weight with a row of zeros, which has no direction, is refused.
"""

import torch
import torch.nn.functional as F
from torch import nn

from lora import LoRALayer
from support import large


class DoRA(LoRALayer):
    """A layer whose weight is m o V / ||V||, V = W + scaling * B A.

    Args: as LoRALayer; base is an nn.Linear.

    Raises:
        ValueError: as LoRALayer; or a row of the weight is zero.
    """

    kind = "dora"

    def __init__(self, base, *args, **kwargs):
        super().__init__(base, *args, **kwargs)
        magnitude = base.weight.detach().to(*large.wide(base.weight)).norm(dim=1)  # (out,)
        if not magnitude.all():
            raise ValueError(
                f"row {int((magnitude == 0).nonzero()[0])} of a weight is zero: DoRA has no "
                "direction for it, leave that layer out of the targets"
            )
        self.lora_magnitude = nn.Parameter(magnitude)

    def factors(self):
        return {**super().factors(), "lora_magnitude": self.lora_magnitude}

    def pair(self):
        raise ValueError("DoRA changes the weight by full rank: no pair of A and B equals it")

    def weight(self):
        """W, the frozen weight, (out, in), also while the module is merged."""
        return self.weight_before_merge if self.merged else self.base.weight

    def ratio(self, A, B):
        """m / ||V||, (out,); the norm is a constant to autograd."""
        with torch.no_grad(), torch.autocast(A.device.type, enabled=False):
            # ||V||, V = W + scaling * B A, row by row; in float32 beside a W of 16 bits
            v = self.weight() + self.scaling * (B @ A)  # (out, in)
            norm = v.norm(dim=1)  # (out,)
        m = self.lora_magnitude if self.enabled else self.lora_magnitude.detach()
        return m / norm

    def forward(self, x):
        """(…, in) -> (…, out)."""
        h = self.base(x)  # (b, t, out)
        if self.merged or not self.in_forward:
            return h
        A, B = self.branch()
        ratio = self.ratio(A, B)  # (out,)
        if self.lora_dropout and self.training:
            x = F.dropout(x, self.lora_dropout)
            wx = F.linear(x, self.base.weight)  # (b, t, out)
        else:
            wx = h if self.base.bias is None else h - self.base.bias
        # h = m / ||V|| o (W x + scaling * B A x) + b  =  base(x) + (m / ||V|| - 1) o W x + …
        branch = F.linear(F.linear(x, A), self.scaling * B)  # (b, t, out)
        return h + (ratio - 1) * wx + ratio * branch

    def delta_w(self):
        """What the layer adds to the weight, (out, in)."""
        A, B = self.branch()
        # ΔW = m / ||V|| o V - W
        v = self.weight() + self.scaling * (B @ A)  # (out, in)
        return self.ratio(A, B)[:, None] * v - self.weight()
