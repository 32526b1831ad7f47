"""Delta-LoRA: the frozen weight also moves, by the change of B A (arXiv 2309.02411, Algorithm 1).

    forward     h = W_t x + s B_t A_t x,     s = lora_alpha / r, no dropout on the branch
    step        A and B by the optimizer (AdamW); W has no gradient and no moments
    t > K       W_{t+1} = W_t + lambda s (B_{t+1} A_{t+1} - B_t A_t)

    name            | symbol     | shape
    ratio           | lambda     | number
    start           | K          | integer; t counts optimizer steps from 0
    layer.scaling   | s          | number
    old_A, old_B    | A_t, B_t   | (r, in), (out, r)  copies, taken before the optimizer's step
    begin, end      |            | the pairs (A, B) at which a stretch of moving W began and ended

When W moves. Algorithm 1 counts t from 0 and asks for t > K, strictly. So with start=K the weight
moves first after optimizer step K + 2 (counted from 1), by lambda s (P(K+2) - P(K+1)), where P(n)
is B A after n steps. start=-1 moves it from the first step on.

What it comes to. The changes telescope: after T steps W_T - W_0 = lambda s (P(T) - P(K+1)). The
effective weight is therefore W_0 + (1 + lambda) s P(T) - lambda s P(K+1): W_0 plus a matrix of rank
2r at most (r with start=-1). That is an ordinary LoRA adapter, and export() returns it. Whatever
the path, the total update is not "high-rank".

With an allocation. A module that is off does not move W, and W keeps what it has. (If it is frozen,
its branch stays in the forward pass, at scale s, and in the export.) The module's stretch ends with
the switch, and is kept; when the module returns, a new stretch begins from its pair as it is then.
Over all stretches W_T - W_0 = lambda s sum (P_end - P_begin). A pair that returns unchanged
cancels, and the rank is 2r at most again.

Two things to know. With the adapter off the model computes with W_T, not W_0. And merging gives
W_T + s B A, with scale s: W_T holds the lambda part already. (With lazy=True the weight is W_0, and
what is merged W_0 + s B A: the lambda part stays in the forward pass. export() has all of it.)

deviates: nothing.

What this file does not do: dropout on the branch (refused: with it dL/d(BA) is no longer s dL/dW,
the reason for which the paper removes it); move a weight of 16 bits or less, or one that two layers
share (refused, but for lazy=True, which leaves W alone).
"""

import math

import torch
from torch import nn

from lora import LoRALayer, adapters
from support import doors, large


def delta_update_(weight, new_A, new_B, old_A, old_B, coefficient):
    """Move a weight by the change of B A, in place (Algorithm 1, the last line of the loop).

    Args:
        weight: (out, in), changed in place.
        new_A, new_B: (r, in), (out, r) after the optimizer's step. old_A, old_B: before it.
        coefficient: lambda s.
    """
    # B' A' - B A = [B', -B] [A'; A]: one product of thin matrices
    left = torch.cat([new_B, -old_B], dim=1)  # (out, 2r)
    right = torch.cat([new_A, old_A], dim=0)  # (2r, in)
    # W <- W + lambda s (B' A' - B A), without an (out, in) temporary
    weight.addmm_(left, right, alpha=coefficient)


def refuse_unsuitable(model, layers, ratio, start, lazy):
    """Raises ValueError where Delta-LoRA would be wrong, with the module and the reason."""
    if not math.isfinite(ratio):
        raise ValueError(f"ratio is {ratio}, allowed: a finite number (the paper's lambda)")
    if not isinstance(start, int) or start < -1:
        raise ValueError(
            f"start is {start!r}, allowed: an integer from -1 (from the first step) up"
        )
    if not any(isinstance(layer.base, nn.Linear) for layer in layers.values()):
        raise ValueError(
            "Delta-LoRA needs LoRA modules on linear layers: there is no weight to move"
        )
    owners = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), set()).add(f"{name}.{key}")
    doors.refuse_merged(layers)
    for name, layer in layers.items():
        if layer.lora_dropout:
            raise ValueError(
                f"{name} has lora_dropout {layer.lora_dropout}: Delta-LoRA needs 0, for with it "
                "the change of B A no longer stands for the gradient of W"
            )
        kind = type(layer)
        if (kind.forward, kind.branch) != (LoRALayer.forward, LoRALayer.branch):
            raise ValueError(
                f"{name} is a {kind.__name__}: Delta-LoRA is for the B A of its own lora_A, lora_B"
            )
        if lazy and layer.base._forward_hooks:
            raise ValueError(f"{name} has a forward hook already: lazy=True needs a fresh model")
        if not isinstance(layer.base, nn.Linear) or lazy:
            continue
        weight = layer.base.weight
        large.refuse_to_move(name, weight)
        if weight.requires_grad:
            raise ValueError(f"{name} has a trainable weight: freeze it (lora.mark_trainable)")
        if len(owners[id(weight)]) > 1:
            shared = ", ".join(sorted(owners[id(weight)]))
            raise ValueError(f"{name} has a weight that is shared ({shared}): moving it moves both")


def combine(terms):
    """Sum of c B A, [(A, B, c)]: equal pairs collected, what cancels or is 0 left out."""
    result = []
    for A, B, c in terms:
        for i, (other_A, other_B, other_c) in enumerate(result):
            if torch.equal(A, other_A) and torch.equal(B, other_B):
                result[i] = (A, B, c + other_c)
                break
        else:
            result.append((A, B, c))
    return [(A, B, c) for A, B, c in result if c != 0 and B.any()]


class DeltaLoRA:
    """Two calls around optimizer.step(): before_step() copies A and B, after_step() moves W.

    They belong around every optimizer step, never around a micro-batch and never into forward. W
    moves where a module has a linear base, and only while the module is on.

    Args:
        model: model.Transformer with adapters, its weights frozen.
        ratio: lambda.
        start: K; W first moves after optimizer step K + 2; -1 = from the first.
        lazy: leave W_0 alone, and let the forward pass add the same change; see lazy_hook.

    Raises:
        ValueError: see refuse_unsuitable.
    """

    def __init__(self, model, ratio=0.5, start=500, lazy=False):
        layers = adapters(model)
        refuse_unsuitable(model, layers, ratio, start, lazy)
        self.adapters = {n: a for n, a in layers.items() if isinstance(a.base, nn.Linear)}
        self.ratio, self.start, self.lazy = ratio, start, lazy
        self.scaling = {name: layer.scaling for name, layer in self.adapters.items()}  # s
        self.t = 0  # optimizer steps done
        self.old = {}  # name -> (A_t, B_t) of the step that is under way
        self.begin = {}  # name -> (A, B) where the stretch that is open began
        self.ended = {name: [] for name in self.adapters}  # name -> [(A, B, sign)] of those before
        if lazy:
            for name, layer in self.adapters.items():
                hook = self.lazy_hook(name)
                layer.base.register_forward_hook(hook)

    def pair(self, name):
        """(lora_A (r, in), lora_B (out, r)) of a module, without its scale."""
        layer = self.adapters[name]
        return layer.lora_A.detach(), layer.lora_B.detach()

    def before_step(self):
        """Call after backward (and clipping), before optimizer.step(); refused while merged."""
        doors.refuse_merged(self.adapters)
        self.old = {}
        for name, layer in self.adapters.items():
            if not layer.enabled:
                self.end_stretch(name)
            elif self.t > self.start:  # strict, t from 0: Algorithm 1
                self.old[name] = tuple(p.clone() for p in self.pair(name))
                self.begin.setdefault(name, self.old[name])

    @torch.no_grad()
    def after_step(self):
        """Call after optimizer.step(): W <- W + lambda s (B' A' - B A)."""
        if not self.lazy:
            for name, (old_A, old_B) in self.old.items():
                coefficient = self.ratio * self.scaling[name]
                weight = self.adapters[name].base.weight
                delta_update_(weight, *self.pair(name), old_A, old_B, coefficient)
        self.old = {}
        self.t += 1

    def end_stretch(self, name):
        """End a module's stretch where its pair stands: it went off, or is about to be redrawn."""
        if name in self.begin:
            end = tuple(p.clone() for p in self.pair(name))
            self.ended[name] += [(*end, 1), (*self.begin.pop(name), -1)]

    def terms(self, name):
        """W - W_0 as a short sum: [(A, B, c)] with W - W_0 = sum c B A."""
        terms = list(self.ended[name])
        if name in self.begin:
            terms += [(*self.pair(name), 1), (*self.begin[name], -1)]
        # W - W_0 = lambda s sum (P_end - P_begin)
        coefficient = self.ratio * self.scaling[name]
        return combine([(A, B, sign * coefficient) for A, B, sign in terms])

    def export(self):
        """The whole result as an ordinary LoRA adapter on the original weights W_0.

        Its scale is 1, and W is not needed.

        Returns:
            dict name -> (lora_A (R, in), lora_B (out, R)); R <= 2r, and 0 for a module that adds
            nothing: its W has not moved, and it is out of the forward pass or its B is 0. With
            single ranks R <= 3r, of a product of rank 2r at most.
        """
        result = {}
        for name, layer in self.adapters.items():
            terms = self.terms(name)
            if layer.in_forward:
                pair = (p.detach() for p in layer.branch())
                terms = combine([(*pair, layer.scaling), *terms])
            A, B = self.pair(name)
            # A' = [A_T; A_begin; …],  B' = [(1 + lambda) s B_T, -lambda s B_begin, …]
            result[name] = (
                torch.cat([A[:0], *(A for A, _, _ in terms)]),  # (R, in)
                torch.cat([B[:, :0], *(c * B for _, B, c in terms)], 1),  # (out, R)
            )
        return result

    @torch.no_grad()
    def back_to_pretrained(self):
        """Take the change out of W again, exact up to rounding; reload the model for the bits.

        A and B stay. The stretches are forgotten, so that W can move anew. Refused while merged.
        """
        doors.refuse_merged(self.adapters)
        for name, layer in self.adapters.items():
            if not self.lazy:
                for A, B, c in self.terms(name):
                    # W_0 = W_T - sum c B A
                    layer.base.weight.addmm_(B, A, alpha=-c)
            self.begin.pop(name, None)
            self.ended[name] = []

    def weight_change(self):
        """dict name -> ||W_t - W_0||_F, from the pairs alone: sqrt of sum over terms of <.,.>."""
        norms = {}
        for name in self.adapters:
            total = 0.0
            terms = [(A.double(), B.double(), c) for A, B, c in self.terms(name)]
            for A, B, c in terms:
                for other_A, other_B, other_c in terms:
                    # <c B A, c' B' A'> = c c' sum (B^T B') o (A A'^T), of r x r matrices
                    inner = ((B.T @ other_B) * (A @ other_A.T)).sum().item()
                    total += c * other_c * inner
            norms[name] = math.sqrt(max(0.0, total))
        return norms

    def state(self):
        """For a checkpoint: position, stretches, and W itself, added up step by step.

        W_0 and the pairs give W but for rounding, and a resumed run has the same bits. Refused
        while merged, as load() is.
        """
        doors.refuse_merged(self.adapters)
        weights = {n: a.base.weight.detach() for n, a in self.adapters.items() if not self.lazy}
        return {"t": self.t, "begin": self.begin, "ended": self.ended, "weights": weights}

    @torch.no_grad()
    def load(self, state):
        """Put back what state() gave, on the model's device."""
        doors.refuse_merged(self.adapters)
        device = next(iter(self.adapters.values())).lora_A.device
        self.t = state["t"]
        self.begin = {n: tuple(p.to(device) for p in pair) for n, pair in state["begin"].items()}
        self.ended = {
            n: [(A.to(device), B.to(device), sign) for A, B, sign in terms]
            for n, terms in state["ended"].items()
        }
        for name, weight in state["weights"].items():
            self.adapters[name].base.weight.copy_(weight)

    # ------------------------------------------------- --delta-lazy yes; not for a first reading

    def lazy_hook(self, name):
        """A forward hook of a frozen base that adds W's change to what the untouched W_0 gives.

        h = W_0 x + lambda s sum (P_end - P_begin) x, without a gradient to A and B: the same losses
        on a base that is shared or read-only, for two more pairs of thin products in each module.
        """

        def add(_module, inputs, output):
            for A, B, c in self.terms(name):
                thin = large.exact_linear(inputs[0], A)  # (b, t, r)
                output = output + large.exact_linear(thin, c * B)  # (b, t, out)
            return output

        return add
