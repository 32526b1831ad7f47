"""AdaLoRA: ranks are masked until a budget is met (arXiv 2303.10512, Algorithm 1).

    ΔW = alpha / r * B diag(E) A,     E = 0 at the start, A and B random, held near orthogonal
    S_k = s(E_k) + mean_j s(A_kj) + mean_i s(B_ik)              score of triplet k of a module
    s(w) = I(w) U(w),   I <- b1 I + (1 - b1) |w dL/dw|,   U <- b2 U + (1 - b2) ||w dL/dw| - I|
    b(t) = b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_i - t_f))^3    ranks that stay after step t

b is b_0 up to t_i, and b_T from T - t_f on; it is rounded down. Every `interval` steps E_k of all
but the b(t) best triplets of all modules together is 0; A_k and B_k stay and learn, and a triplet
can return. At T - t_f the choice is final, and is applied after every step.

    name        | symbol    | shape
    lora_E      | E         | (r, 1)       a number for each rank
    sensitivity | I         | as the factor, b1 = 0.85
    uncertainty | U         | as the factor, b2 = 0.85
    total       | b_0, b_T  | r times the modules, and keep of it
    GAMMA       | gamma     | 0.1; gamma * mean ||A A^T - I||_F, ||B^T B - I||_F joins the loss

w dL/dw is of before the step, as in the paper; the published code takes the new w with the old
gradient. deviates: the paper squares the norms of the penalty and sums them; its code, whose gamma
this is, takes their mean. Its scale has r + 1e-5, and its mask drops every triplet of a tie.

What this file does not do: shortcuts, which keep all their ranks; costs: a rank counts as 1.
"""

import torch
from torch import nn

import lora
from lora import LoRALayer

GAMMA, BETA1, BETA2 = 0.1, 0.85, 0.85


class AdaLoRALayer(LoRALayer):
    """ΔW = scaling * B diag(E) A; arguments as in LoRALayer, of whose A the generator is used."""

    def __init__(
        self, base, in_features, out_features, r=8, lora_alpha=16, lora_dropout=0.0, generator=None
    ):
        super().__init__(base, in_features, out_features, r, lora_alpha, lora_dropout, generator)
        with torch.no_grad():
            for factor in (self.lora_A, self.lora_B):  # N(0, 0.02^2)
                factor.copy_(0.02 * torch.randn(factor.shape, generator=generator))
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


def budget(t, total, target, warmup, final, steps):
    """b(t): how many triplets stay after step t (from 1); warmup, final: t_i, t_f in steps."""
    if t <= warmup:
        return total
    if t >= steps - final:
        return target
    # b(t) = b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_i - t_f))^3
    return int(target + (total - target) * (1 - (t - warmup) / (steps - warmup - final)) ** 3)


class AdaLoRA:
    """The masks, around the optimizer's step.

    Args:
        model: model.Transformer whose targets have AdaLoRALayer.
        steps: int, T, of the whole run. interval: int, steps between two masks.
        keep: float, b_T / b_0. t_i is a sixth of the run, t_f a half of it.
        rest: what other allocators take.

    Raises:
        ValueError: keep leaves no rank.
    """

    adapter, single_ranks = AdaLoRALayer, False

    def __init__(self, model, *, steps, interval, keep, **rest):
        layers = lora.adapters(model).items()
        self.layers = {n: a for n, a in layers if isinstance(a, AdaLoRALayer)}
        self.steps, self.interval, self.t = steps, interval, 0
        self.warmup, self.final = steps // 6, steps // 2
        self.total = sum(a.r for a in self.layers.values())
        self.target = int(keep * self.total)
        if self.target < 1:
            raise ValueError(f"--keep {keep:g} of {self.total} ranks is none: give more")
        layers = self.layers.items()
        self.factors = {f"{n}.{k}": f for n, a in layers for k, f in a.factors().items()}
        self.sensitivity = {name: torch.zeros_like(f) for name, f in self.factors.items()}
        self.uncertainty = {name: torch.zeros_like(f) for name, f in self.factors.items()}
        self.mask = {n: torch.ones_like(a.lora_E) for n, a in self.layers.items()}  # of the last

    @torch.no_grad()
    def before_step(self):
        """The penalty into the gradients, the weights into the scores."""
        for layer in self.layers.values():
            for factor, rows in ((layer.lora_A, layer.lora_A), (layer.lora_B, layer.lora_B.T)):
                off = rows @ rows.T - torch.eye(layer.r).to(rows)  # (r, r)
                # d ||Q Q^T - I||_F / dQ = 2 (Q Q^T - I) Q / ||Q Q^T - I||_F
                slope = 2 * off @ rows / off.norm().clamp(min=1e-12)
                slope = slope if factor is rows else slope.T
                factor.grad += GAMMA / (2 * len(self.layers)) * slope
        if self.t < self.steps - self.final:
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
        last = self.steps - self.final
        if (self.warmup < self.t < last and self.t % self.interval == 0) or self.t == last:
            b = budget(self.t, self.total, self.target, self.warmup, self.final, self.steps)
            scores = torch.cat(list(self.scores().values()))  # (total,)
            best = scores.argsort(descending=True, stable=True)[:b]  # of equals the first ones
            chosen = torch.zeros_like(scores).index_fill_(0, best, 1.0)
            parts = chosen.split([a.r for a in self.layers.values()])
            self.mask = {n: m[:, None] for n, m in zip(self.layers, parts, strict=True)}
        elif self.t < last:
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
