"""PRoLoRA: most ranks are one chunk, repeated and rotated along the features (arXiv 2402.16902).

    name          | symbol | shape
    unshared_r    | u      | number, 0 <= u <= r: ranks that are plain LoRA
    x_A, x_B      |        | numbers: copies of the chunk along in, along out
    lora_A_shared |        | (r - u, in / x_A)   the chunk of A; lora_A_own (u, in)
    lora_B_shared |        | (out / x_B, r - u)  the chunk of B; lora_B_own (out, u); both zero
    shift         |        | max(1, floor((r - u) / x)): copy j is rotated by -j * shift

Copies rotated along the rank axis pair each chunk of A with other rows of the chunk of B: block
(i, j) of what they change in W depends on (i * shift_B - j * shift_A) mod (r - u) alone. With
x_A = x_B = 1, or u = r, it is LoRA, with the same start.

"Rectified": the chunk of A is drawn within 1/sqrt(in) of zero, with the whole fan-in and not the
chunk's. Scaling is lora_alpha / r.

deviates: the released code truncates the last chunk where x does not divide the features; here that
is refused. u = 1 and x = 4 are ours: the paper tunes them. For others make a subclass whose
__init__ hands them on.

What this file does not do: unrotated sharing, or sharing between layers (tied.py).
"""

import torch
from torch import nn

from lora import LoRALayer


def repeated(chunk, x):
    """Copies of a chunk (ranks, n) beside each other, copy j rotated: (ranks, x n)."""
    shift = max(1, len(chunk) // x)
    # copy j, row k = chunk, row (k + j * shift) mod ranks
    return torch.cat([chunk.roll(-j * shift, 0) for j in range(x)], 1)


class PRoLoRA(LoRALayer):
    """LoRALayer whose pair is made of chunks.

    Args: as LoRALayer; and unshared_r, x_A, x_B, integers.

    Raises:
        ValueError: as LoRALayer; u above r, or copies that do not divide the features.
    """

    def __init__(self, *args, unshared_r=1, x_A=4, x_B=4, **kwargs):
        super().__init__(*args, **kwargs)
        n_in, n_out, shared = self.in_features, self.out_features, self.r - unshared_r
        if not 0 <= unshared_r <= self.r:
            raise ValueError(f"unshared_r is {unshared_r}, allowed: 0 to r, which is {self.r}")
        for x, n, where in ((x_A, n_in, "in"), (x_B, n_out, "out")):
            if x < 1 or n % x:
                raise ValueError(f"PRoLoRA: {x} copies of a chunk do not make {n} {where}_features")
        self.x_A, self.x_B = x_A, x_B
        A, B = self.lora_A.detach(), self.lora_B.detach()  # drawn with the whole fan-in
        del self.lora_A, self.lora_B
        self.lora_A_shared = nn.Parameter(A[:shared, : n_in // x_A].clone())
        self.lora_B_shared = nn.Parameter(B[: n_out // x_B, :shared].clone())
        self.lora_A_own = nn.Parameter(A[shared:].clone())  # (u, in)
        self.lora_B_own = nn.Parameter(B[:, shared:].clone())  # (out, u)

    def factors(self):
        names = ("lora_A_shared", "lora_B_shared", "lora_A_own", "lora_B_own")
        found = {name: getattr(self, name) for name in names}
        return {name: factor for name, factor in found.items() if factor.numel()}

    def from_zero(self):
        return torch.cat([repeated(self.lora_B_shared.T, self.x_B), self.lora_B_own.T])  # (r, out)

    def branch(self):
        # A = [chunk, chunk rolled by -shift, …; own],  B^T likewise;  ΔW = scaling * B A
        A = torch.cat([repeated(self.lora_A_shared, self.x_A), self.lora_A_own])  # (r, in)
        B = self.from_zero().T  # (out, r)
        return (A, B) if self.enabled else (A.detach(), B.detach())
