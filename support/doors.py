"""What is given to injection, merging and scoring is checked at the door, before any change.

    refuse_foreign   of a model: it is none of ours
    refuse_numbers   of a model: weights that hold no numbers, or too small a range of them
    refuse_adapted   of a model: it is to get adapters, and has some
    refuse_places    of the places that are to be adapted: unknown, or none
    refuse_names     of what is to be switched on: no set of names of modules
    refuse_merged    of modules that are to train on with Delta-LoRA: merged
    refuse_merge     of modules: merged, or with a branch that no matrix equals
    refuse_batches   of a list of batches: each must have a loss, and read inside the tables

What this file does not do: check files (hf_folder.py, form.py) or flags (settings.py).
"""

import torch

from support import large


def refuse_foreign(model, places):
    """Raises ValueError where a model has no blocks with these places."""
    blocks = getattr(model, "layers", [None])
    if not all(hasattr(block, place) for block in blocks for place in places):
        raise ValueError(
            f"the model is a {type(model).__name__}, expected a model.Transformer, as "
            "load_pretrained gives it"
        )


def refuse_numbers(model):
    """Raises ValueError where a model's weights cannot be adapted or scored."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"{name} is on the device meta, a shape without numbers: load it first"
            )
        if parameter.dtype not in (torch.float32, torch.float64, torch.bfloat16):
            raise ValueError(
                f"{name} is in {parameter.dtype}, whose range gradients leave: call model.float()"
            )


def refuse_adapted(model, layers):
    """Raises ValueError where a model cannot be given adapters; layers: those that it has."""
    refuse_numbers(model)
    if layers:
        raise ValueError("the model has LoRA modules already: take a freshly loaded model")


def refuse_places(config, *given):
    """Raises ValueError where a place is unknown, or there is nothing to adapt.

    Args:
        config: of the model. given: (places asked for, places allowed), of targets, of shortcuts.
    """
    for places, allowed in given:
        for place in places:
            if place not in allowed:
                raise ValueError(f"unknown target {place!r}, allowed: {', '.join(allowed)}")
    asked = {place for places, _ in given for place in places}
    if not asked:
        linears = ", ".join(given[0][1])
        raise ValueError(f"nothing to adapt: name at least one target out of {linears}")
    why = {}
    if not config.gated:
        why["gate_proj"] = f"a {config.family} model has no gate_proj"
    if config.num_layers == 1:
        why["shortcut_ffn"] = "the first block has no shortcut_ffn, and it is alone"
    if asked <= why.keys():
        reasons = ", and ".join(why[place] for place in sorted(asked))
        raise ValueError(f"nothing to adapt: {reasons}: name another target")


def refuse_names(on, layers):
    """Raises ValueError where what is to be switched on is no set of names of modules."""
    if not isinstance(on, set | frozenset):
        raise ValueError(f"what is on is a {type(on).__name__}, expected a set of names")
    if on - layers.keys():
        odd = min(on - layers.keys(), key=repr)
        raise ValueError(f"no module is called {odd!r}, allowed: the names in adapters(model)")


def refuse_merged(layers):
    """Raises ValueError where a weight holds B A as well: unmerge would undo what is done to it."""
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name} is merged: call unmerge(model) before Delta-LoRA")


def refuse_merge(layers, chosen):
    """Raises ValueError where a model cannot be merged.

    Args:
        layers, chosen: dict name -> LoRALayer, of the model, and of what is to be merged.
    """
    if any(layer.merged for layer in layers.values()):
        raise ValueError("the model is merged already: call unmerge(model) before merging again")
    linear = {n: a.base.weight for n, a in layers.items() if isinstance(a.base, torch.nn.Linear)}
    for name, layer in chosen.items():
        if layer.unmergeable:
            raise ValueError(f"{name} cannot be merged: {layer.unmergeable}")
        other = next((n for n, w in linear.items() if w is layer.base.weight and n != name), None)
        if other:
            raise ValueError(f"{name} has the weight of {other}: merging one changes both")
        large.refuse_merge(name, layer.base.weight, next(iter(layer.factors().values())))
        if layer.lora_dropout and layer.training:
            raise ValueError(
                f"{name} has lora_dropout {layer.lora_dropout} in train mode: call model.eval()"
            )


def refuse_batches(model, batches):
    """Raises ValueError where a list of batches cannot be scored.

    Args:
        model: model.Transformer. batches: list or tuple of dicts of tensors, read more than once.
    """
    if not isinstance(batches, list | tuple):
        raise ValueError(
            f"batches is a {type(batches).__name__}, expected a list: it is read more than once"
        )
    if not batches:
        raise ValueError("scoring needs at least one batch")
    for i, batch in enumerate(batches):
        refuse_batch(model, batch, f"batch {i}")


def refuse_batch(model, batch, where):
    """Raises ValueError where a batch has no loss, or would read outside a table."""
    for name in ("input_ids", "attention_mask", "labels"):
        found = batch.get(name) if isinstance(batch, dict) else None
        if not torch.is_tensor(found) or not found.numel():
            raise ValueError(f"{where} has no {name}: expected a dict of tensors that holds it")
        device = model.word_embeddings.weight.device
        if found.device != device:
            raise ValueError(f"{where} is on {found.device}, the model on {device}")
    config, labels = model.config, batch["labels"]
    shape, types = batch["input_ids"].shape, batch.get("token_type_ids")
    if batch["attention_mask"].shape != shape:
        masked = tuple(batch["attention_mask"].shape)
        raise ValueError(
            f"{where} has input_ids {tuple(shape)}, attention_mask {masked}: not alike"
        )
    limits = [("input_ids", batch["input_ids"], config.vocab_size)]
    if types is not None and config.type_vocab_size:
        limits.append(("token_type_ids", types, config.type_vocab_size))
    if config.head == "lm":
        limits.append(("labels", labels[labels != -100], config.vocab_size))
        if not (labels[:, 1:] != -100).any():
            raise ValueError(f"{where} has no token to predict: its labels are all -100")
    elif config.num_labels > 1:
        limits.append(("labels", labels, config.num_labels))
        if labels.is_floating_point():
            raise ValueError(f"{where} has labels in {labels.dtype}, expected class ids (int64)")
    for name, values, limit in limits:
        low, high = (int(v) for v in values.aminmax()) if values.numel() else (0, 0)
        if low < 0 or high >= limit:
            raise ValueError(f"{where} has {name} {low} to {high}, allowed: 0 to {limit - 1}")
