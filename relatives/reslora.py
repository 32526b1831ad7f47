"""ResLoRA: a module's branch also takes from the same place in the blocks before.

Shi et al.: ResLoRA, Identity Residual Mapping in Low-Rank Adaption (arXiv 2402.18039). Parameters
are LoRA's, r (m + n) a module. Here n counts blocks; k goes back to the first, pre blocks at most.

    --adapter       | branch of the module in block n                       | merges
    reslora_input   | s B_n A_n (x_n + x_{n-1})                             | no
    reslora_block   | sum_{k = 0 … pre} s B_{n-k} A_{n-k} x_n               | exactly
    reslora_middle  | s B_n (A_n x_n + sum_{k = 1 … pre} A_{n-k} x_{n-k})   | no

    name     | symbol           | shape
    before   |                  | list of the modules that n takes from, the nearest first
    passed   | x_k, or A_k x_k  | list of (b, t, in) or (b, t, r), of this forward pass so far; None
             |                  | where the module is off (middle)

In block 0, with nothing before it, all three are LoRA. x_n depends on the example, so input and
middle add no fixed matrix to W: merge() and a PEFT file are refused, and the adapter file holds A
and B under the method's own kind.

Off: the module computes base(x) alone, and its pair is gone from its neighbours' branches too, so
that it has no gradient anywhere. What it received is still passed on by reslora_input: an input is
no part of a branch. A score made from factors counts a pair wherever it stands.

deviates: block 0 of reslora_input has no x_{n-1}, the published code takes x_0 twice there; the
same code's merge of input and middle by ratios of norms, which is not exact, is not done; and of
reslora_block it drops out on the input of each pair anew, where here all pairs have one mask.

What this file does not do: several pairs a module, which the published code adds over time.
"""

import torch
import torch.nn.functional as F

from lora import LoRALayer
from relatives.tied import by_place


class ResLoRABlock(LoRALayer):
    """Its pair, and those of the blocks before, all on its own input."""

    pre = 4  # as in the paper's runs on GLUE
    before = ()

    @classmethod
    def connect(cls, layers, seed):
        for chain in by_place(layers):
            passed = []
            for n, layer in enumerate(chain):
                layer.before = chain[max(0, n - layer.pre) : n][::-1]
                layer.passed, layer.n, layer.last = passed, n, n == len(chain) - 1

    def branch(self):
        # sum_k B_{n-k} A_{n-k} = [B_n, B_{n-1}, …] [A_n; A_{n-1}; …]
        pairs = [super().branch(), *(LoRALayer.branch(a) for a in self.before if a.in_forward)]
        A, B = zip(*pairs, strict=True)
        return torch.cat(A), torch.cat(B, 1)  # (R, in), (out, R)


class ResLoRAInput(ResLoRABlock):
    """Its pair, on the sum of its input and the input of the block before."""

    kind = "reslora_input"
    every_token = True
    pre = 1
    branch = LoRALayer.branch

    @property
    def unmergeable(self):
        return f"{self.kind} adds what earlier blocks received, and no matrix on x alone does that"

    def forward(self, x):
        """(…, in) -> (…, out); to be called block by block, once each, as a Transformer does.

        Raises:
            RuntimeError: out of turn, as by activation checkpointing, which calls a block again.
        """
        if self.n == 0:
            self.passed.clear()  # of a forward pass that did not come to its end
        if len(self.passed) != self.n:
            raise RuntimeError(f"{self.kind} is called block by block, once each, and not again")
        h, handed = self.base(x), self.hand_on(x)
        if self.in_forward:
            # input: x_n + x_{n-1};  middle: A_n x_n + sum_{k = 1 … pre} A_{n-k} x_{n-k}
            received = self.passed[len(self.passed) - len(self.before) :]
            total = sum((e for e in received if e is not None), handed)
            # h = W x_n + s B_n (A_n total);  middle: h = W x_n + s B_n total
            h = h + F.linear(self.thin(total), self.scaling * self.branch()[1])  # (b, t, out)
        self.passed.append(handed)
        if self.last:
            self.passed.clear()  # the graph is not held longer than the pass
        return h

    def hand_on(self, x):
        return x  # (b, t, in)

    def thin(self, total):
        x = F.dropout(total, self.lora_dropout, self.training)
        return F.linear(x, self.branch()[0])  # (b, t, r)

    def delta_w(self):
        """Raises ValueError: there is none."""
        raise ValueError(self.unmergeable)

    pair = delta_w


class ResLoRAMiddle(ResLoRAInput):
    """Its pair, with what the A of the blocks before made of their inputs added in the middle."""

    kind = "reslora_middle"
    pre = ResLoRABlock.pre

    def hand_on(self, x):
        if not self.in_forward:
            return None
        x = F.dropout(x, self.lora_dropout, self.training)
        return F.linear(x, self.branch()[0])  # (b, t, r)

    def thin(self, total):
        return total  # (b, t, r)
