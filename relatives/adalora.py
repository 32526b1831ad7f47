"""AdaLoRA: ranks are masked until a budget is met (arXiv 2303.10512, Algorithm 1).

    ΔW = alpha / r * B diag(E) A,     A and B held near orthogonal      (triplets.py)
    S_k = s(E_k) + mean_j s(A_kj) + mean_i s(B_ik)              score of triplet k of a module
    s(w) = I(w) U(w),   I <- b1 I + (1 - b1) |w dL/dw|,   U <- b2 U + (1 - b2) ||w dL/dw| - I|
    b(t) = b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_i - t_f))^3    ranks that stay after step t

b is b_0 up to t_i, and b_T from T - t_f on; it is rounded down. Every `interval` steps E_k of all
but the b(t) best triplets of all modules together is 0. A_k and B_k stay; E_k moves again with the
next step, in which the loss gives A_k and B_k no gradient (moments, decay and the penalty move them
all the same), and the triplet can return. At T - t_f the choice is final, and is applied after
every step.

    name        | symbol    | shape
    lora_E      | E         | (r, 1)       a number for each rank
    sensitivity | I         | as the factor, b1 = 0.85
    uncertainty | U         | as the factor, b2 = 0.85
    total       | b_0       | r times the modules
    target      | b_T       | keep times that
    warmup      | t_i       | ours: a sixth of the steps, T (the paper: for each task)
    last        | T - t_f   | ours: when half of the steps are left

w dL/dw, with the penalty in L, is of before the step, as in the paper, and I and U follow up to the
last choice; the published code takes the new w with the old gradient, and stops one step before.
deviates: the schedule as printed (appendix A) has t - t_i - t_f above the line, and is more than
b_0 at first; this is the published code's, whose t is one less; its mask drops every triplet of
a tie; and --clip leaves the penalty alone, where the paper's is a term of the loss (triplets.py).

What this file does not do: shortcuts, which keep all their ranks; costs: a rank counts as 1.
"""

import torch

import lora
from relatives.triplets import AdaLoRALayer, add_penalty

BETA1, BETA2 = 0.85, 0.85


def budget(t, total, target, warmup, last):
    """b(t): how many triplets stay after step t (from 1); warmup, last: t_i, T - t_f, in steps."""
    if t <= warmup:
        return total
    if t >= last:
        return target
    # b(t) = b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_i - t_f))^3
    return int(target + (total - target) * (1 - (t - warmup) / (last - warmup)) ** 3)


class AdaLoRA:
    """The masks, around the optimizer's step.

    Args:
        model: model.Transformer whose targets have AdaLoRALayer.
        steps: int, T, of the whole run. interval: int, steps between two masks.
        keep: float, b_T / b_0.
        rest: what other allocators take.

    Raises:
        ValueError: keep leaves no rank.
    """

    adapter, single_ranks = AdaLoRALayer, False

    def __init__(self, model, *, steps, interval, keep, **rest):
        layers = {n: a for n, a in lora.adapters(model).items() if isinstance(a, AdaLoRALayer)}
        self.layers, self.interval, self.t = layers, interval, 0
        self.warmup, self.last = steps // 6, steps - steps // 2
        self.total = sum(a.r for a in layers.values())
        self.target = int(round(keep * self.total, 9))  # 0.7 * 90 is 62.99999999999999
        if self.target < 1:
            raise ValueError(f"--keep {keep:g} of {self.total} ranks is none: give more")
        self.factors = {f"{n}.{k}": f for n, a in layers.items() for k, f in a.factors().items()}
        self.sensitivity = {name: torch.zeros_like(f) for name, f in self.factors.items()}
        self.uncertainty = {name: torch.zeros_like(f) for name, f in self.factors.items()}
        self.mask = {n: torch.ones_like(a.lora_E) for n, a in layers.items()}  # of the last

    @torch.no_grad()
    def before_step(self):
        """The penalty into the gradients, the weights into the scores."""
        add_penalty(self.layers.values())
        if self.t < self.last:
            for name, w in self.factors.items():
                sensed = (w * w.grad).abs()
                self.sensitivity[name].lerp_(sensed, 1 - BETA1)
                self.uncertainty[name].lerp_((sensed - self.sensitivity[name]).abs(), 1 - BETA2)

    def scores(self):
        """dict name -> (r,), S_k of its triplets."""
        s = {name: self.sensitivity[name] * self.uncertainty[name] for name in self.factors}
        # S_k = s(E_k) + mean_j s(A_kj) + mean_i s(B_ik)
        return {
            n: s[f"{n}.lora_E"][:, 0] + s[f"{n}.lora_A"].mean(1) + s[f"{n}.lora_B"].mean(0)
            for n in self.layers
        }

    @torch.no_grad()
    def after_step(self):
        """The mask, where it is due."""
        self.t += 1
        due = self.warmup < self.t < self.last and self.t % self.interval == 0
        if due or self.t == self.last:
            b = budget(self.t, self.total, self.target, self.warmup, self.last)
            scores = torch.cat(list(self.scores().values()))  # (total,)
            best = scores.argsort(descending=True, stable=True)[:b]  # of equals the first ones
            chosen = torch.zeros_like(scores).index_fill_(0, best, 1.0)
            parts = chosen.split([a.r for a in self.layers.values()])
            self.mask = {n: m[:, None] for n, m in zip(self.layers, parts, strict=True)}
        elif self.t < self.last:
            return
        for name, layer in self.layers.items():
            layer.lora_E *= self.mask[name]

    def state(self):
        """What a checkpoint keeps."""
        return {k: getattr(self, k) for k in ("t", "sensitivity", "uncertainty", "mask")}

    def load(self, state):
        """Put back what state() gave, on the model's device."""
        self.t = state["t"]
        for key in ("sensitivity", "uncertainty", "mask"):
            like = getattr(self, key)
            setattr(self, key, {n: x.to(like[n].device) for n, x in state[key].items()})
