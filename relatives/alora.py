"""ALoRA: ranks move between modules, under a constant budget (arXiv 2403.16187, Algorithm 1).

    ΔW = alpha / r * B diag(a) A,      gates a of 0 or 1
    IS(k) = S(M) - S(M without k) + S(M with k alone),      S = -loss      (exchange.py)

After the first epoch, and then every `interval` steps, ROUNDS times at most: of all ranks the n
that matter least are pruned, and n new ones (A Gaussian, B zero) are given to the modules that lost
none, one each in the order of their mean importance, until all are given. n is the number of
modules. So there are r times the modules at all times. What is new trains for `interval` steps at
least: where fewer are left, there is no round any more.

    name      | symbol | meaning
    ranks_off | a = 0  | of a module (lora.py): no part in the forward pass, no step, no decay
    places    |        | a module has 2 r of them, r gates are open at first
    forget    |        | drops the optimizer's moments: a new rank starts without any

deviates: the budget stays, where the paper prunes n in any case, and adds only if some module lost
none: what trains at once is what the arms of a comparison share. So where those modules have less
room than n, fewer are pruned; a module holds 2 r ranks at most (or min(in, out), if that is less).
Importance is measured on the first examples of the training set (--score-batches), where the paper
takes a batch for validation: no choice looks at those. The paper's interval is a quarter of an
epoch (here --every), and its n may be meant of one block. Shortcuts take part with r places: they
lose ranks, and grow only what they lost. No code was published.

What this file does not do: weigh what a rank costs, in + out: it counts as 1.
"""

import torch

import lora
from lora import LoRALayer
from relatives.exchange import exchange, importance

ROUNDS = 8


class ALoRALayer(LoRALayer):
    """A LoRALayer with 2 r places, half of them off, at the scale of r."""

    def __init__(
        self, base, in_features, out_features, r=8, lora_alpha=16, lora_dropout=0.0, generator=None
    ):
        largest = min(in_features, out_features)
        places, alpha = r, lora_alpha
        if isinstance(r, int) and 1 <= r <= largest:  # else LoRALayer says what is wrong
            places = min(2 * r, largest)
            alpha = lora_alpha * places / r
        super().__init__(base, in_features, out_features, places, alpha, lora_dropout, generator)
        self.ranks_off = list(range(r, places))


class ALoRA:
    """The gates, after the optimizer's step.

    Args:
        model: model.Transformer whose targets have ALoRALayer.
        steps, per_epoch: int, of the run and of an epoch. interval: int, steps between two rounds.
        batches: function () -> list of batches that importance is measured on.
        generator: torch.Generator, of new ranks.
        parts: dict module -> [(row of A, column of B)], what the optimizer steps (rank_steps.py).
        forget: function (parameter), drops its moments.
        rest: what other allocators take.

    Raises:
        ValueError: what the first round brings could not train for `interval` steps.
    """

    adapter, single_ranks = ALoRALayer, True

    def __init__(
        self, model, *, steps, per_epoch, interval, batches, generator, parts, forget, **rest
    ):
        if steps < per_epoch + interval:
            raise ValueError("--allocate alora moves ranks after the first epoch: give --epochs 2")
        self.model, self.layers = model, lora.adapters(model)
        self.per_epoch, self.interval, self.t = per_epoch, interval, 0
        self.last = steps - interval  # a round after this step is the last that can be
        self.batches, self.generator, self.parts, self.forget = batches, generator, parts, forget

    def before_step(self):
        """Nothing: a round is after a step."""

    def after_step(self):
        """One round, where it is due."""
        self.t += 1
        since = self.t - self.per_epoch
        due = since >= 0 and since % self.interval == 0 and since // self.interval < ROUNDS
        if due and self.t <= self.last:
            self.round()

    @torch.no_grad()
    def round(self):
        """Prune and grow."""
        layers = self.layers.items()
        on = {name: layer.r - len(layer.ranks_off) for name, layer in layers}
        scores = importance(self.model, self.batches())
        pruned, grown = exchange(scores, {n: a.r for n, a in layers}, on)
        for name, k in pruned:
            self.layers[name].ranks_off = sorted([*self.layers[name].ranks_off, k])
            self.layers[name].lora_B[:, k] = 0  # gone, not kept for later
        for name, count in grown.items():
            layer = self.layers[name]
            for k in layer.ranks_off[:count]:
                n, kind = layer.in_features, torch.float32
                row = torch.randn(n, generator=self.generator, dtype=kind)  # (in,)
                # of the variance that lora_A has at first, 1 / (3 in)
                layer.lora_A[k] = row.to(layer.lora_A) * (3 * n) ** -0.5
                layer.lora_B[:, k] = 0
                for parameter in self.parts[name][k]:
                    self.forget(parameter)
            layer.ranks_off = layer.ranks_off[count:]

    def state(self):
        """What a checkpoint keeps; the gates are in it as ranks_off."""
        return {"t": self.t, "rng": self.generator.get_state()}

    def load(self, state):
        self.t = state["t"]
        self.generator.set_state(state["rng"])
