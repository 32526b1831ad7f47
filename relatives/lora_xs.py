"""LoRA-XS: an r x r matrix between frozen singular vectors of W (arXiv 2405.17604, section 3).

    name   | symbol     | shape
    lora_B | U_r        | (out, r)  the r first left singular vectors of W; frozen
    lora_A | S_r V_r^T  | (r, in)   the r first right ones, times the singular values; frozen
    lora_R | R          | (r, r)    N(0, 1e-5), the deviation; all that trains

W = U S V^T. With R = I and scaling 1 the branch is the best approximation of W of rank r
(Eckart-Young). R does not start at zero: the gradient of R is there either way, as released.

Three things differ from LoRA. The start is the base up to a change of W whose norm is about
1e-5 * scaling * sqrt(r) ||A||_F. What is off has an R that is not zero, so it counts as stored.
And the parameters are r * r, whatever W is.

deviates: released versions take a randomised SVD, or one in float32. Here it is exact, in float64,
and each column of U_r has its largest entry positive, so that R means the same on another machine.
W and the draw give all of it again: a checkpoint holds R alone.

What this file does not do: singular vectors of anything but W; W of rank below r, which is refused.
"""

import torch
from torch import nn

from lora import LoRALayer
from support import large

DEVIATION = 1e-5  # of the entries of R at the start


def singular_pair(weight, r):
    """(U_r (out, r), S_r V_r^T (r, in)) of a weight (out, in), in its dtype (bfloat16: float32).

    Raises:
        ValueError: the weight has fewer than r singular values that are not zero.
    """
    # W = U S V^T
    U, S, Vh = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    device, dtype = large.wide(weight)
    smallest = S[0] * max(weight.shape) * torch.finfo(dtype).eps
    rank = int((smallest < S).sum())
    if r > rank:
        raise ValueError(f"r is {r}, and a weight has rank {rank}: LoRA-XS needs r up to that")
    U, A = U[:, :r], S[:r, None] * Vh[:r]  # (out, r), (r, in)
    sign = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()  # (1, r)
    return (U * sign).to(device, dtype), (A * sign.T).to(device, dtype)


class LoRAXS(LoRALayer):
    """LoRALayer whose pair is frozen, with a trained lora_R between.

    Args: as LoRALayer; base is an nn.Linear.

    Raises:
        ValueError: as LoRALayer; r above the rank of the weight.
    """

    def __init__(
        self, base, in_features, out_features, r=8, lora_alpha=16, lora_dropout=0.0, generator=None
    ):
        super().__init__(base, in_features, out_features, r, lora_alpha, lora_dropout, generator)
        B, A = singular_pair(base.weight, r)
        self.lora_A = nn.Parameter(A, requires_grad=False)  # (r, in)
        self.lora_B = nn.Parameter(B, requires_grad=False)  # (out, r)
        R = DEVIATION * torch.randn(r, r, generator=generator, dtype=torch.float32)  # (r, r)
        self.lora_R = nn.Parameter(R.to(A))

    def factors(self):
        return {"lora_R": self.lora_R}

    def from_zero(self):
        return self.lora_R  # (r, r), and not from zero: what is off is stored as well

    def branch(self):
        # ΔW = scaling * U_r R S_r V_r^T
        R = self.lora_R if self.enabled else self.lora_R.detach()
        return self.lora_A, self.lora_B @ R  # (r, in), (out, r)
