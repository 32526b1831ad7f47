"""CoRA: B is the common subspace of W_q, W_k and W_v.

Xiao et al.: CoRA, Optimizing Low-Rank Adaptation with Common Subspace of Large Language Models
(arXiv 2409.02119).

    name    | symbol | shape
    common  | U_r    | (d, r)     the first r left singular vectors of [W_q, W_k, W_v], (d, 3 in)
    lora_A  | A      | (r, in)    zero at the start, since B is not
    lora_B  | B      | (out, r)   U_r, orthonormal columns

    --adapter       | what trains | parameters for W (m x n) | B
    cora            | A           | r n                      | frozen, one for q, k and v of a block
    cora_trained    | A and B     | r (m + n)                | each module's own, from there on

A score that is weight times gradient is 0 at the start, as at LoRA's B = 0: here since A = 0.

deviates: the paper takes the subspace from several fine-tuned models, here from the three weights
of the one model that there is. That A starts at 0 is what B != 0 asks for; the paper's full text
could not be read. A column of U_r has its largest entry positive, so that no machine's SVD turns
its sign.

What this file does not do: other places than q, k and v, which have no common subspace here.
"""

import torch
from torch import nn

from lora import LoRALayer
from support import large

PLACES = ("q_proj", "k_proj", "v_proj")


def common_subspace(weights, r):
    """The r directions that hold most of all the weights' columns: (d, r), orthonormal.

    Args:
        weights: list of (d, in). r: int, 1 <= r <= d.
    """
    # [W_q, W_k, W_v] = U S V^T;  U_r maximises sum over W of ||U_r^T W||_F^2
    U = torch.linalg.svd(torch.cat([w.double() for w in weights], 1), full_matrices=False)[0]
    U = U[:, :r]  # (d, r)
    largest = U.gather(0, U.abs().argmax(0, keepdim=True))  # (1, r)
    return (U * largest.sign()).to(*large.wide(weights[0]))


class CoRATrained(LoRALayer):
    """LoRA that starts from A = 0 and B = U_r, and trains both."""

    @staticmethod
    def connect(layers, seed):
        """ValueError: not q, k and v of every block and nothing else, or not of one size."""
        blocks = {}
        for name, layer in layers.items():
            blocks.setdefault(name.rpartition(".")[0], {})[name.rpartition(".")[2]] = layer
        for block, places in blocks.items():
            if set(places) != set(PLACES):
                wanted, got = ",".join(PLACES), ",".join(places)
                raise ValueError(f"cora needs the targets {wanted} and no other, got {got}")
            weights = [places[place].base.weight.detach() for place in PLACES]
            if len({w.shape for w in weights}) > 1:
                sizes = ", ".join(str(tuple(w.shape)) for w in weights)
                raise ValueError(f"cora needs q, k and v of one size, {block} has {sizes}")
            common = nn.Parameter(common_subspace(weights, places["q_proj"].r))  # (d, r)
            for layer in places.values():
                layer.take(common)

    @torch.no_grad()
    def take(self, common):
        # A = 0, B = U_r: the adapted model starts as the pretrained one
        self.lora_A.zero_()
        self.lora_B.copy_(common)

    def from_zero(self):
        return self.lora_A  # (r, in)


class CoRA(CoRATrained):
    """LoRA with B = U_r frozen, one for q, k and v; A alone trains."""

    def take(self, common):
        super().take(common)
        self.lora_B = common  # shared

    def factors(self):
        # h = W x + s U_r A x
        return {"lora_A": self.lora_A}
