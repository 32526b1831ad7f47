"""LoRA: a frozen layer plus a trainable low-rank pair (arXiv 2106.09685), by module replacement.

One kind of module is the whole search space of HeteroLoRA (2406.14956): what differs is its base.

    layers.{i}.q_proj … fc2                base = the frozen nn.Linear
    layers.{i}.residual_1, residual_2      base = identity: a LoRA-adapted residual connection
    layers.{i}.shortcut_sa, shortcut_ffn   base = zero: a LoRA-adapted cross-layer shortcut

    name        | symbol    | shape
    lora_A      | A         | (r, in)    kaiming_uniform(a=sqrt(5)): within 1/sqrt(in) of zero
    lora_B      | B         | (out, r)   zero: the adapted model starts as the pretrained one
    scaling     | alpha / r | number
    delta_w()   | ΔW        | (out, in)  scaling * B A

What this file does not do: decide which modules are on (allocate.py), train (train.py), adapt
embeddings, LayerNorm, convolutions or biases.
"""

import torch
import torch.nn.functional as F
from torch import nn

from support import seeds

LINEARS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
RESIDUALS = ("residual_1", "residual_2")
CROSS = ("shortcut_sa", "shortcut_ffn")
SHORTCUTS = {"none": (), "residual": RESIDUALS, "cross": CROSS, "all": RESIDUALS + CROSS}


class Zero(nn.Module):
    """The base of a cross-layer shortcut: where there was no connection."""

    def forward(self, x):
        return x.new_zeros(())  # scalar: broadcast by whatever is added to it


class LoRALayer(nn.Module):
    """h = base(x) + scaling * B A x        (arXiv 2106.09685, Eq. 3)

    Args:
        base: nn.Linear, nn.Identity or Zero; frozen by mark_trainable.
        in_features, out_features: int, of the map that is adapted.
        r: int, 1 <= r <= min(in_features, out_features).
        lora_alpha: float; scaling = lora_alpha / r.
        lora_dropout: float, on the input of the low-rank branch, in train mode.
        generator: torch.Generator for lora_A.

    Raises:
        ValueError: r or lora_dropout out of range.
    """

    def __init__(
        self, base, in_features, out_features, r=8, lora_alpha=16, lora_dropout=0.0, generator=None
    ):
        super().__init__()
        largest = min(in_features, out_features)
        if not isinstance(r, int) or not 1 <= r <= largest:
            raise ValueError(f"r is {r!r}, allowed: an integer from 1 to {largest} for this layer")
        if not 0 <= lora_dropout < 1:
            raise ValueError(f"lora_dropout is {lora_dropout}, allowed: 0 <= lora_dropout < 1")
        self.base = base
        self.in_features, self.out_features = in_features, out_features
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, lora_dropout
        self.scaling = lora_alpha / r
        # Row by row: the first rows are the same at every rank, and (as float32) in every dtype.
        uniform = torch.rand(r, in_features, generator=generator)  # (r, in)
        bound = in_features**-0.5
        like = getattr(base, "weight", uniform)  # dtype and device
        self.lora_A = nn.Parameter(((2 * uniform - 1) * bound).to(like))  # (r, in)
        self.lora_B = nn.Parameter(torch.zeros(out_features, r).to(like))  # (out, r)
        self.weight_before_merge = None
        self._enabled = True

    @property
    def merged(self):
        return self.weight_before_merge is not None

    @property
    def enabled(self):
        """Off: base(x) alone, no cost, no gradient; A and B are kept for when it returns."""
        return self._enabled

    @enabled.setter
    def enabled(self, value):
        if self.merged:
            raise ValueError(
                "a merged module cannot be switched on or off: call unmerge(model) first"
            )
        self._enabled = bool(value)

    def forward(self, x):
        if self.merged or not self.enabled:
            return self.base(x)
        h = F.dropout(x, self.lora_dropout, self.training) if self.lora_dropout else x
        h = F.linear(h, self.lora_A)  # (b, t, r)
        # scaling sits on the small factor: (out, r) numbers instead of (b, t, out)
        return self.base(x) + F.linear(h, self.scaling * self.lora_B)  # (b, t, out)

    def delta_w(self):
        """scaling * B A, (out, in)."""
        return self.scaling * (self.lora_B @ self.lora_A)  # (out, in)

    def keep_ranks(self, kept):
        """Shrink to some of the rank-one parts; scaling stays: what is kept computes what it did.

        A and B become new, smaller parameters: build the optimizer afterwards.

        Args:
            kept: list of indices into 0 … r - 1, not empty.
        """
        if not kept:
            raise ValueError("kept is empty: to drop every rank, set enabled = False")
        self.lora_A = nn.Parameter(self.lora_A.detach()[kept].clone())  # (r, in)
        self.lora_B = nn.Parameter(self.lora_B.detach()[:, kept].clone())  # (out, r)
        self.r = len(kept)
        self.lora_alpha = self.scaling * self.r

    def extra_repr(self):
        return f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}"


# ---------------------------------------------------------------------------------------- injection


def inject(
    model,
    targets=("q_proj", "v_proj"),
    r=8,
    lora_alpha=16,
    lora_dropout=0.0,
    shortcuts=(),
    shortcut_alpha=4,
    seed=0,
):
    """Put a LoRALayer in place of each target, in every layer; the model changes in place.

    The initial lora_A of a module depends on (seed, its name) alone, whatever else is adapted.

    Args:
        model: model.Transformer.
        targets: names out of LINEARS.
        r, lora_alpha, lora_dropout: as in LoRALayer, for targets; r and lora_dropout for shortcuts
            too.
        shortcuts: names out of RESIDUALS + CROSS. Layer 0 has no shortcut_ffn: nothing comes before
            it.
        shortcut_alpha: float, lora_alpha of the shortcuts.
        seed: int.

    Returns:
        adapters(model).

    Raises:
        ValueError: an unknown name, nothing to adapt, a rank out of range, or a model that is
            injected.
    """
    for given, allowed in ((targets, LINEARS), (shortcuts, RESIDUALS + CROSS)):
        for name in given:
            if name not in allowed:
                raise ValueError(f"unknown target {name!r}, allowed: {', '.join(allowed)}")
    if not targets and not shortcuts:
        raise ValueError(f"nothing to adapt: name at least one target out of {', '.join(LINEARS)}")
    if adapters(model):
        raise ValueError(
            "the model has LoRA modules already: inject once, into a freshly loaded model"
        )
    d = model.config.hidden_size
    new = {}
    for i, block in enumerate(model.layers):
        for place in LINEARS + RESIDUALS + CROSS:
            if place not in (*targets, *shortcuts) or (place == "shortcut_ffn" and i == 0):
                continue
            name = f"layers.{i}.{place}"
            base = getattr(block, place) or Zero()
            if place in LINEARS:
                sizes, alpha = (base.in_features, base.out_features), lora_alpha
            else:
                sizes, alpha = (d, d), shortcut_alpha
            rng = seeds.generator(seed, f"lora_A/{name}")
            new[name] = LoRALayer(base, *sizes, r, alpha, lora_dropout, rng)
    for name, layer in new.items():  # only now: a refused rank leaves the model as it was
        parent, _, place = name.rpartition(".")
        setattr(model.get_submodule(parent), place, layer.to(model.word_embeddings.weight))
    return adapters(model)


def adapters(model):
    """dict name -> LoRALayer, layer by layer, linears before shortcuts."""
    order = LINEARS + RESIDUALS + CROSS
    found = {}
    for i, block in enumerate(model.layers):
        for place in order:
            if isinstance(getattr(block, place), LoRALayer):
                found[f"layers.{i}.{place}"] = getattr(block, place)
    return found


def mark_trainable(model):
    """Adapters and head get requires_grad, all else is frozen; biases of the backbone never train.

    The head is what is new for the task (model.head): the classifier, and a pooler that the
    checkpoint did not bring.

    Returns:
        dict name -> number of trainable parameters, for each adapter that is on and each head
        module.
    """
    model.requires_grad_(False)
    for layer in adapters(model).values():
        layer.lora_A.requires_grad_(True)
        layer.lora_B.requires_grad_(True)
    for module in model.head:
        model.get_submodule(module).requires_grad_(True)
    return count_trainable(model)


def trainable(model):
    """dict name -> parameter, in a fixed order: adapters that are on or off, then the head."""
    found = {}
    for name, layer in adapters(model).items():
        found |= {f"{name}.lora_A": layer.lora_A, f"{name}.lora_B": layer.lora_B}
    for module in model.head:
        for name, parameter in model.get_submodule(module).named_parameters():
            found[f"{module}.{name}"] = parameter
    return found


def count_trainable(model):
    """dict name -> trainable parameters: r (in + out) of an adapter that is on; head modules."""
    counts = {
        name: sum(p.numel() for p in (layer.lora_A, layer.lora_B) if p.requires_grad)
        for name, layer in adapters(model).items()
        if layer.enabled
    }
    for module in model.head:
        parameters = model.get_submodule(module).parameters()
        counts[module] = sum(p.numel() for p in parameters if p.requires_grad)
    return counts


# ------------------------------------------------------------------------------------------ merging


def merge(model):
    """W <- W + scaling * B A for every module that is on and has a weight; the model computes the
    same.

    A module that is off contributes nothing before and nothing after. A shortcut has no weight to
    merge into: it stays a low-rank branch, and the output is still the same.

    Returns:
        tuple of the names that were merged; what is on and not in it is a shortcut.

    Raises:
        ValueError: already merged; or lora_dropout > 0 in train mode, where the branch is random
            and no fixed weight equals it (call model.eval() first).
    """
    layers = adapters(model)
    if any(layer.merged for layer in layers.values()):
        raise ValueError("the model is merged already: call unmerge(model) before merging again")
    chosen = {n: a for n, a in layers.items() if a.enabled and isinstance(a.base, nn.Linear)}
    for name, layer in chosen.items():
        if layer.lora_dropout and layer.training:
            raise ValueError(
                f"{name} has lora_dropout {layer.lora_dropout} in train mode: call model.eval()"
            )
    with torch.no_grad():
        for layer in chosen.values():
            layer.weight_before_merge = layer.base.weight.detach().clone()  # (out, in)
            layer.base.weight += layer.delta_w()
    return tuple(chosen)


def unmerge(model):
    """Give every merged module its weight back, bit for bit (from a copy: subtracting would round).

    Raises:
        ValueError: nothing is merged.
    """
    merged = [layer for layer in adapters(model).values() if layer.merged]
    if not merged:
        raise ValueError("the model is not merged: nothing to unmerge")
    with torch.no_grad():
        for layer in merged:
            layer.base.weight.copy_(layer.weight_before_merge)
            layer.weight_before_merge = None
