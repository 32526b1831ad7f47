"""CondLoRA: one linear map for all blocks makes each module's pair out of its frozen weight.

Kim, Sasaki, Hoshino, Honda: A Single Linear Layer Yields Task-Adapted Low-Rank Matrices
(arXiv 2403.14946).

    name      | symbol    | shape
    W         | W         | (n, n)  frozen, a constant to autograd; square, or A has no size
    lora_A    | Theta_A   | (r, n)  shared by the modules of one place; drawn like LoRA's A
    lora_B    | Theta_B^T | (n, r)  shared likewise; zero at the start
    branch()  | A, B      | (r, n), (n, r)  made from W

Trainable parameters: 2 r n for each place, however many blocks there are.

What is shared trains while one of its modules is on, and gets the sum of their gradients. No module
has factors of its own: scores that are made from factors are equal within a place, and a choice
there is by lot; the slot scores (grad_norm_slot, snip_slot) tell blocks apart.

deviates: the published code drops out the input of W as well, where lora_dropout is not 0; here, as
everywhere, of the branch alone.

What this file does not do: the published code's additional map of x (use_x).
"""

import torch.nn.functional as F

from lora import LoRALayer
from relatives.tied import share_pairs


class CondLoRA(LoRALayer):
    """A LoRALayer whose A and B are images of its frozen weight. Its arguments are the same.

    Raises:
        ValueError: as LoRALayer; or W is not square.
    """

    def __init__(self, base, in_features, out_features, *args, **kwargs):
        if in_features != out_features:
            raise ValueError(
                f"condlora needs square weights, this one is {out_features} x {in_features}: "
                "leave fc1 and fc2 out of the targets"
            )
        super().__init__(base, in_features, out_features, *args, **kwargs)

    @staticmethod
    def connect(layers, seed):
        """Both maps of a place are those that its module in the first block has drawn."""
        share_pairs(layers)

    def branch(self):
        W = self.weight_before_merge if self.merged else self.base.weight.detach()  # (n, n)
        W = W.to(self.lora_A.dtype)  # of a base in bfloat16
        # A = (W Theta_A^T)^T,  B = W Theta_B^T:  ΔW = s W Theta_B^T Theta_A W^T
        A, B = F.linear(self.lora_A, W), W @ self.lora_B  # (r, n), (n, r)
        return (A, B) if self.enabled else (A.detach(), B.detach())
