"""LoRA: a frozen layer plus a trainable low-rank pair (arXiv 2106.09685), by module replacement.

One kind of module is the whole search space of HeteroLoRA (arXiv 2406.14956). What differs is its
base:

    place                        | base                | what the module is
    q_proj … gate_proj           | the frozen nn.Linear | a LoRA-adapted linear layer
    residual_1, residual_2       | the identity        | a LoRA-adapted residual connection
    shortcut_sa, shortcut_ffn    | zero                | a LoRA-adapted cross-layer shortcut

A module's name is "layers.{i}.{place}", with i the number of the block, from 0.

    name        | symbol    | shape
    lora_A      | A         | (r, in)    kaiming_uniform(a=sqrt(5)): within 1/sqrt(in) of zero
    lora_B      | B         | (out, r)   zero: the adapted model starts as the pretrained one
    scaling     | alpha / r | number
    delta_w()   | ΔW        | (out, in)  scaling * B A
    when_off    |           | "out": what is off leaves the forward pass; "frozen": it stays in it
    ranks_off   | k         | indices of the ranks that are off (support/switches.py); mostly []
    R           |           | rank of a pair in a file: of the ranks that count, or of several pairs

What this file does not do: decide which modules are on (allocate.py), train (train.py), adapt
embeddings, LayerNorm or biases. What is given to it is checked in support/doors.py. "Released",
here and in other files, is said of the code of HeteroLoRA's authors (docs/deviations.md).
"""

import torch
import torch.nn.functional as F
from torch import nn

from support import adapter_file, doors, large, seeds, switches

LINEARS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "gate_proj")
RESIDUALS = ("residual_1", "residual_2")
CROSS = ("shortcut_sa", "shortcut_ffn")
SHORTCUTS = {"none": (), "residual": RESIDUALS, "cross": CROSS, "all": RESIDUALS + CROSS}
PLACES = LINEARS + RESIDUALS + CROSS


class Zero(nn.Module):
    """The base of a cross-layer shortcut: where there was no connection."""

    def forward(self, x):
        return x.new_zeros(())  # a scalar, which is broadcast by whatever is added to it


class LoRALayer(nn.Module):
    """A frozen base with a low-rank branch beside it (arXiv 2106.09685, Eq. 3).

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

    kind = "lora"  # what its adapter file says; a kind of another name is stored as it is
    unmergeable = ""  # where no matrix equals the branch: why
    every_token = False  # whether it has to see all tokens, also in the last block

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
        # A ~ U(-1/sqrt(in), 1/sqrt(in)), row by row: the first rows are the same at every rank,
        # and drawn in float32 the same in every dtype.
        uniform = torch.rand(r, in_features, generator=generator, dtype=torch.float32)  # (r, in)
        bound = in_features**-0.5
        like = large.wide(getattr(base, "weight", uniform))  # device and dtype
        self.lora_A = nn.Parameter(((2 * uniform - 1) * bound).to(*like))  # (r, in)
        self.lora_B = nn.Parameter(torch.zeros(out_features, r).to(*like))  # (out, r)
        self.weight_before_merge = None
        self.locked = False  # it, or another module of the model, is merged
        self._enabled = True
        self.when_off = "out"
        self.ranks_off = []
        switches.join_state_dict(self)

    @property
    def merged(self):
        return self.weight_before_merge is not None

    @property
    def enabled(self):
        """Off: no gradient, no step; A and B are kept for when it returns.

        With when_off "out" the module is then base(x) alone and costs nothing; with "frozen" its
        branch stays in the forward pass as it is. A parameter without a gradient has .grad None,
        and the optimizer leaves it alone altogether: no step, no weight decay, no change of its
        moments.
        """
        return self._enabled

    @enabled.setter
    def enabled(self, value):
        if self.locked:
            raise ValueError(
                "a module of a merged model cannot be switched on or off: call unmerge(model) first"
            )
        self._enabled = bool(value)

    @property
    def in_forward(self):
        """Whether the branch takes part in the forward pass: on, or off and frozen."""
        return self.enabled or self.when_off == "frozen"

    def branch(self):
        """(A, B), also of what is out of the forward pass; what is off gets no gradient."""
        A, B = self.lora_A, self.lora_B
        if not self.enabled:
            return A.detach(), B.detach()
        return switches.by_rank(A, B, self.ranks_off, self.when_off) if self.ranks_off else (A, B)

    def forward(self, x):
        """(…, in) -> (…, out)."""
        if self.merged or not self.in_forward:
            return self.base(x)
        A, B = self.branch()
        dropped = F.dropout(x, self.lora_dropout, self.training) if self.lora_dropout else x
        down = F.linear(dropped, A)  # (…, r)
        # h = base(x) + scaling * B (A dropout(x)); the scale on B: (out, r) numbers, not (…, out)
        return self.base(x) + F.linear(down, self.scaling * B)  # (…, out)

    def delta_w(self):
        """What the branch adds to the weight where it is in the forward pass, (out, in)."""
        # ΔW = scaling * B A
        A, B = self.branch()
        return self.scaling * (B @ A)  # (out, in)

    def factors(self):
        """The tensors that train, by name; another module may share some of them."""
        return {"lora_A": self.lora_A, "lora_B": self.lora_B}

    def from_zero(self):
        """The factor that starts at zero, (r, …): row k is zero until rank k has learned."""
        return self.lora_B.T  # (r, out)

    @staticmethod
    def connect(layers, seed):
        """Make modules share what they share, once, before they are put in their places.

        Args:
            layers: dict name -> module on a target, all of this class. seed: int.

        Raises:
            ValueError: they cannot; LoRA's share nothing.
        """

    def pair(self):
        """(A (R, in), B (out, R)) with ΔW = B A: what the module exports as, at scale 1."""
        A, B = self.branch()
        return A.detach(), self.scaling * B.detach()

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
    adapter=LoRALayer,
    when_off="out",
):
    """Put a LoRALayer in place of each target, in every block; the model changes in place.

    The initial lora_A of a module depends on (seed, its name) alone, whatever else is adapted.

    Args:
        model: model.Transformer.
        targets: places out of LINEARS; gate_proj is skipped where the feed-forward has no gate.
        r, lora_dropout: as in LoRALayer. lora_alpha: likewise, of the targets.
        shortcuts: places out of RESIDUALS + CROSS. Block 0 has no shortcut_ffn, since nothing
            comes before it.
        shortcut_alpha: float, lora_alpha of the shortcuts.
        seed: int.
        adapter: the class of what is put on the targets; shortcuts are LoRALayers always.
        when_off: "out" (the released rule) or "frozen": what becomes of a module that is off.

    Returns:
        adapters(model).

    Raises:
        ValueError: an unknown place or when_off, nothing to adapt, a rank or lora_dropout out of
            range, a weight that the adapter refuses, or a model that is injected, without numbers
            (meta), in float16, or no model.Transformer.
    """
    doors.refuse_adapted(model, adapters(model))
    doors.refuse_places(model.config, (targets, LINEARS), (shortcuts, RESIDUALS + CROSS))
    if when_off not in ("out", "frozen"):
        raise ValueError(f"when_off is {when_off!r}, allowed: out, frozen")
    new = {}
    for name in names_of(model, {*targets, *shortcuts}):
        base, n_in, n_out = base_of(model, name)
        linear = isinstance(base, nn.Linear)
        kind, alpha = (adapter, lora_alpha) if linear else (LoRALayer, shortcut_alpha)
        rng = seeds.generator(seed, f"lora_A/{name}")
        new[name] = kind(base, n_in, n_out, r, alpha, lora_dropout, rng)
    adapter.connect({n: a for n, a in new.items() if isinstance(a.base, nn.Linear)}, seed)
    for name, layer in new.items():  # only now: what is refused leaves the model as it was
        layer.when_off = when_off
        put(model, name, layer)
    return adapters(model)


def names_of(model, places):
    """Names of the modules that a model can have in a set of places, block by block."""
    if not model.config.gated:
        places = places - {"gate_proj"}
    for i in range(len(model.layers)):
        here = places if i else places - {"shortcut_ffn"}
        yield from (f"layers.{i}.{place}" for place in PLACES if place in here)


def base_of(model, name):
    """(base, in_features, out_features) of a module that is to be, by its name."""
    block, _, place = name.rpartition(".")
    base = getattr(model.get_submodule(block), place) or Zero()
    if place in LINEARS:
        return base, base.in_features, base.out_features
    return base, model.config.hidden_size, model.config.hidden_size


def put(model, name, layer):
    """Set a module in its place, on the model's device and in the dtype that it trains in."""
    block, _, place = name.rpartition(".")
    setattr(model.get_submodule(block), place, large.placed(layer, model))


def adapters(model):
    """dict name -> LoRALayer, block by block, linear layers before shortcuts.

    Raises:
        ValueError: not a model.Transformer.
    """
    doors.refuse_foreign(model, PLACES)
    found = {}
    for i, block in enumerate(model.layers):
        for place in PLACES:
            if isinstance(getattr(block, place), LoRALayer):
                found[f"layers.{i}.{place}"] = getattr(block, place)
    return found


def switch(model, on):
    """Switch every module on or off.

    Args:
        on: set of names of adapters(model); all others go off.

    Raises:
        ValueError: on is no set, or has a name of none of them; or the model is merged.
    """
    layers = adapters(model)
    doors.refuse_names(on, layers)
    for name, layer in layers.items():
        layer.enabled = name in on


def mark_trainable(model):
    """Adapters and head get requires_grad, all else is frozen; biases of the backbone never train.

    The head is what is trained for the task (model.head): the classifier, and a pooler that the
    checkpoint did not bring, or that is RoBERTa's.

    Returns:
        count_trainable(model).
    """
    model.requires_grad_(False)
    for layer in adapters(model).values():
        for factor in layer.factors().values():
            factor.requires_grad_(True)
    for module in model.head:
        model.get_submodule(module).requires_grad_(True)
    return count_trainable(model)


def trainable(model):
    """dict name -> parameter, in a fixed order: adapters that are on or off, then the head.

    A factor that several modules share stands once, under the name of the first.
    """
    found, seen = {}, set()
    for name, layer in adapters(model).items():
        for key, factor in layer.factors().items():
            if id(factor) not in seen:
                seen.add(id(factor))
                found[f"{name}.{key}"] = factor
    for module in model.head:
        for name, parameter in model.get_submodule(module).named_parameters():
            found[f"{module}.{name}"] = parameter
    return found


def training_now(model):
    """dict name -> parameter of the adapters that are on, and of the head."""
    on = {id(f) for a in adapters(model).values() if a.enabled for f in a.factors().values()}
    off = {id(f) for a in adapters(model).values() for f in a.factors().values()} - on
    return {name: p for name, p in trainable(model).items() if id(p) not in off}


def count_trainable(model, stored=False):
    """dict name -> trainable parameters: r (in + out) of an adapter that is on; head modules.

    Of an adapter whose ranks are not all on, those that are. A factor that several modules share
    is counted once, with the first of them that is on.

    Args:
        model: model.Transformer.
        stored: bool; with True what is off but has learned (B_k other than zero) counts as well:
            what a run keeps, beside what it trains at once.
    """
    counts, seen = {}, set()
    for name, layer in adapters(model).items():
        ranks = set(range(layer.r)) - set(layer.ranks_off) if layer.enabled else set()
        if stored:
            ranks |= {k for k in range(layer.r) if layer.from_zero()[k].any()}
        if ranks:
            own = [f for f in layer.factors().values() if id(f) not in seen and f.requires_grad]
            counts[name] = sum(f.numel() for f in own) * len(ranks) // layer.r
            seen |= {id(f) for f in own}
    for module in model.head:
        parameters = model.get_submodule(module).parameters()
        counts[module] = sum(p.numel() for p in parameters if p.requires_grad)
    return counts


# ------------------------------------------------------------------------------------------ merging


def merge(model):
    """Add every branch in the forward pass that has a weight into it; the model computes the same.

    What is off contributes nothing before and nothing after, unless it is frozen. A shortcut has no
    weight to merge into: it stays a low-rank branch, and the output is still the same.

    Returns:
        tuple of the names that were merged; what is in the forward pass and not in it is a
        shortcut.

    Raises:
        ValueError: already merged; a branch that no matrix equals; a weight that two modules share,
            that is sharded or in 16 bits; or lora_dropout > 0 in train mode, where the branch is
            random (call model.eval() first).
    """
    layers = adapters(model)
    chosen = {n: a for n, a in layers.items() if a.in_forward and isinstance(a.base, nn.Linear)}
    doors.refuse_merge(layers, chosen)
    with torch.no_grad():
        for layer in chosen.values():
            layer.weight_before_merge = layer.base.weight.detach().clone()  # (out, in)
            # W <- W + scaling * B A
            layer.base.weight += layer.delta_w()
    for layer in layers.values():
        layer.locked = bool(chosen)
    return tuple(chosen)


def unmerge(model):
    """Give every merged module its weight back, bit for bit, from a copy: subtracting would round.

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
    for layer in adapters(model).values():
        layer.locked = False


# ------------------------------------------------------------------------------------ adapter files


def save_adapter(model, path, pairs=None):
    """Write all that was trained to one file (support/adapter_file.py), whole or not at all.

    Enabled in the file is what is in the forward pass, on or frozen; of single ranks, those in it.
    A relative is stored as the pair that it comes to, pair() at scale 1, and loads as plain LoRA;
    where there is no such pair, as it is, under its kind.

    Args:
        model: model.Transformer with adapters.
        path: the file, or a folder, which gets adapter.safetensors.
        pairs: dict module -> (lora_A (R, in), lora_B (out, R)) that stands for the module's own
            pair at scale 1: what DeltaLoRA.export() gives, since there W has moved as well.
    """
    # instead: name -> (lora_A, lora_B, scaling), where they are not the module's own
    tensors, about, instead = trainable(model), {}, {}
    for name, layer in adapters(model).items():
        about[name] = {"r": layer.r, "scaling": layer.scaling, "enabled": layer.in_forward}
        if layer.kind != "lora":
            about[name]["kind"] = layer.kind
        if layer.kind == "lora" and type(layer) is not LoRALayer:
            tensors = {n: t for n, t in tensors.items() if not n.startswith(f"{name}.")}
            instead[name] = (*layer.pair(), 1.0)
        elif layer.enabled and layer.ranks_off:
            instead[name] = (*layer.branch(), layer.scaling)
    for name, (A, B) in (pairs or {}).items():
        instead[name] = (A, B, 1.0)
        about[name]["enabled"] = len(A) > 0
    for name, (A, B, scaling) in instead.items():
        tensors |= {f"{name}.lora_A": A, f"{name}.lora_B": B}
        about[name] |= {"r": len(A), "scaling": scaling}
    adapter_file.write(path, tensors, about, model.config.shortcut_norm)


def load_adapter(model, path, adapter=LoRALayer):
    """Put a saved adapter into a freshly loaded model: modules, switches and head.

    Args:
        model: model.Transformer without adapters, as load_pretrained gives it, with as many labels
            as the run had; and with the weights that it had, which is not checked here.
        path: what save_adapter wrote, or a run folder.
        adapter: the class of what the file holds under a kind of its own.

    Returns:
        adapters(model). All is frozen; call mark_trainable(model) to train on.

    Raises:
        ValueError: a model that has adapters; a file that is no adapter, or of another model.
        FileNotFoundError: no such file.
    """
    doors.refuse_adapted(model, adapters(model))
    tensors, about = adapter_file.read(path, model.config.shortcut_norm)
    kinds = {adapter.kind: adapter, "lora": LoRALayer}
    expected = {name: p.shape for name, p in trainable(model).items()}  # of the head
    adapter_file.refuse_kinds(path, about, kinds, LINEARS)
    layers = {}
    for name, described in about.items():
        layers[name], shapes = described_layer(model, path, name, described, kinds)
        expected |= {f"{name}.{key}": shape for key, shape in shapes.items()}
    adapter_file.refuse_misfit(path, tensors, expected)
    for name, layer in layers.items():  # only now: a refused file leaves the model as it was
        if layer.r == 0:  # it adds nothing (DeltaLoRA.export says when; AdaLoRA: every E_k is 0)
            continue
        for key in layer.factors():  # lora_A (r, in), lora_B (out, r), and what a kind has more
            setattr(layer, key, nn.Parameter(tensors[f"{name}.{key}"].clone()))
        put(model, name, layer)
    own = {name: layer for name, layer in adapters(model).items() if layer.kind != "lora"}
    if own:
        adapter.connect(own, 0)
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            if "lora_" not in name:  # of the head
                parameter.copy_(tensors[name])
    switch(model, {n for n, layer in layers.items() if layer.r and about[n]["enabled"]})
    model.requires_grad_(False)
    return adapters(model)


def described_layer(model, path, name, described, kinds):
    """(a module of the rank, scale and kind that a file says, {factor: the shape it will have}).

    Args:
        path: of the file, for the words. described: {"r", "scaling", "kind"} of the module.
        kinds: dict kind -> class.
    """
    kind, r, scaling = described.get("kind", "lora"), described["r"], described["scaling"]
    if name not in set(names_of(model, set(PLACES))):
        raise ValueError(f"{path} adapts {name}, which this model lacks")
    base, n_in, n_out = base_of(model, name)
    # Of rank 1 at first: Delta-LoRA's 2r may be more than LoRALayer takes for a new pair.
    layer = kinds[kind](base, n_in, n_out, 1, scaling, generator=torch.Generator())
    layer.r, layer.lora_alpha = r, scaling * r
    shapes = {key: factor.shape for key, factor in layer.factors().items()}
    return layer, shapes | {"lora_A": (r, n_in), "lora_B": (n_out, r)}
