"""A PEFT LoRA folder in our terms: read() for a model of ours, put() into it.

    read_folder   config and tensors, each checked, and compared with each other
    fit           the same against a model: which module, which shape, which head, what is missing
    read          both, or one ValueError that lists all that disagrees; the model is not changed

PEFT itself drops an unknown tensor in silence, and leaves a missing one at its initial value.
GPT-2's c_attn (q, k and v in one) becomes three pairs with the same A, each with its rows of B.
With use_dora a module has a magnitude as well, and becomes a relatives.dora.DoRA. An AdaLoRA folder
becomes ordinary pairs, of the ranks that it kept, with E in A.

What this file does not do: embeddings, quantised layers, several adapters in one folder: these are
refused by name (config.py). Pickled code is never executed.
"""

import math
import re
from pathlib import Path

import torch

import lora
from model import Config, Transformer
from relatives.dora import DoRA
from support import download, hf_folder
from support.errors import one_line
from support.families import FAMILIES
from tools.peft.config import is_target, names, pattern_value, read_config
from tools.peft.writing import HEADS, ROOT, Pair, full_path

LARGEST = torch.finfo(torch.float32).max
TENSORS = {  # peft_type -> how the name of a module's tensor ends
    "LORA": r"(?:(lora_[AB])\.weight|(lora_magnitude_vector))",
    "ADALORA": r"(lora_[ABE])()",
}


def sort_tensors(tensors, kind):
    """({full path: {"lora_A": …, "lora_B": …}}, {full path of a head parameter: …}, problems).

    Args:
        tensors: dict name -> tensor. kind: "LORA" or "ADALORA", the config's peft_type.
    """
    factors, head, problems = {}, {}, []
    for name, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(ROOT)}(.+)\.{TENSORS[kind]}", name)
        number = tensor.float() if tensor.is_floating_point() else None
        if not name.startswith(ROOT) or (".lora_" in name and not match):
            problems.append(f"unknown tensor {name}")
        elif number is None or not number.isfinite().all():
            problems.append(f"{name} ({tensor.dtype}) is not a tensor of finite numbers")
        elif match:
            factors.setdefault(match[1], {})[match[2] or match[3]] = number
        else:
            head[name.removeprefix(ROOT)] = number
    return factors, head, problems


def finite(path, pair):
    """(Pair, problems): whether delta W is a matrix of finite numbers."""
    fits = pair.norm() <= LARGEST  # false for NaN too
    return pair, [] if fits else [f"{path}: scale {pair.scaling:g} makes delta W overflow"]


def pair_of(config, path, factors):
    """(Pair or None, problems) of one module.

    scaling = alpha / r, with use_rslora alpha / sqrt(r); alpha and r by the module's path.
    """
    needed = ("lora_A", "lora_B", "lora_magnitude_vector")[: 3 if config["use_dora"] else 2]
    absent = [key for key in needed if key not in factors]
    if absent:
        return None, [f"{path} has no {absent[0]}"]
    if len(factors) > len(needed):
        return None, [f"{path} has a lora_magnitude_vector, and the config no use_dora"]
    a, b, magnitude = (*(factors[key] for key in needed), None)[:3]
    r = pattern_value(config["rank_pattern"], path, config["r"])
    if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1] or len(a) != r:
        shapes = f"lora_A {tuple(a.shape)}, lora_B {tuple(b.shape)}"
        return None, [f"{path}: rank {r} by the config, {shapes}"]
    alpha = pattern_value(config["alpha_pattern"], path, config["lora_alpha"])
    if magnitude is not None and magnitude.shape != (len(b),):
        return None, [f"{path}: lora_magnitude_vector is {tuple(magnitude.shape)}, not ({len(b)},)"]
    scaling = alpha / math.sqrt(r) if config["use_rslora"] else alpha / r
    return finite(path, Pair(a, b, scaling, magnitude))


def adalora_pair(config, path, factors):
    """The same of a module of AdaLoRA: alpha / (init_r + 1e-5) * B diag(E) A, of the ranks kept.

    PEFT's scale is of init_r however many ranks are left, and it has no other one by module.
    """
    absent = [key for key in ("lora_A", "lora_B", "lora_E") if key not in factors]
    if absent:
        return None, [f"{path} has no {absent[0]}"]
    a, b, e = factors["lora_A"], factors["lora_B"], factors["lora_E"]
    start, mask = config["init_r"], (config["rank_pattern"] or {}).get(f"{path}.lora_E")
    if mask is not None and len(mask) != start:
        return None, [f"{path}: init_r is {start}, and its rank_pattern of {len(mask)}"]
    r = start if mask is None else sum(mask)
    if a.ndim != 2 or b.ndim != 2 or (len(a), b.shape[1], *e.shape) != (r, r, r, 1):
        shapes = ", ".join(f"{key} {tuple(t.shape)}" for key, t in sorted(factors.items()))
        return None, [f"{path}: rank {r} by the config, {shapes}"]
    # ΔW = alpha / (init_r + 1e-5) * B diag(E) A
    return finite(path, Pair(e * a, b, config["lora_alpha"] / (start + 1e-5)))


def read_folder(folder):
    """(config, {full path: Pair}, {full path of a head parameter: tensor}, [disagreements]).

    Raises:
        FileNotFoundError: no adapter_config.json, or no tensors.
        ValueError: what config.read_config refuses, or a file that holds no plain tensors.
    """
    folder = Path(folder)
    where = folder / "adapter_config.json"
    if not where.is_file():
        raise FileNotFoundError(f"{folder} is no PEFT adapter: it has no adapter_config.json")
    config = read_config(where)
    files = [folder / f"adapter_model.{kind}" for kind in ("safetensors", "bin")]
    path = next((p for p in files if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder} has no adapter_model.safetensors")
    kind = config["peft_type"]
    factors, head, problems = sort_tensors(hf_folder.read_file(path), kind)
    pairs, targets = {}, config["target_modules"]
    for module, two in factors.items():
        if targets != "all-linear" and not names(targets, module):
            problems.append(f"{module} has tensors and is not in target_modules")
        elif names(config["exclude_modules"], module):
            problems.append(f"{module} has tensors and is in exclude_modules")
        elif not is_target(config, module):
            problems.append(f"{module} has tensors and is not in layers_to_transform")
        pair, more = (adalora_pair if kind == "ADALORA" else pair_of)(config, module, two)
        problems += more
        if pair:
            pairs[module] = pair
    if not factors:
        problems.append(f"{path} has no lora_A and lora_B")
    for key in (config["rank_pattern"] or ()) if kind == "ADALORA" else ():
        if key.removesuffix(".lora_E") not in factors:
            problems.append(f"{key} is in rank_pattern and has no tensor")
    for entry in targets if isinstance(targets, list) else ():
        if not any(names([entry], module) for module in factors):
            problems.append(f"target {entry!r} has no tensors")
    for name in head:
        if not any(f".{m}." in f".{name}" for m in config["modules_to_save"] or ()):
            problems.append(f"{ROOT}{name} has a tensor and is not in modules_to_save")
    return config, pairs, head, problems


# ------------------------------------------------------------------------------------- with a model


def labels_of(head):
    """Rows of the saved classifier, the number of labels; 2 where the folder has none."""
    ends = ("classifier.weight", "classifier.out_proj.weight", "score.weight")
    rows = [len(t) for n, t in head.items() if n.endswith(ends) and t.ndim == 2]
    return rows[0] if rows else 2


def shapes_of(name, num_labels):
    """The model of that name (as of train.py) in shapes alone, on the "meta" device.

    Raises:
        ValueError: its config.json has sizes that no tensor can have.
    """
    hf = hf_folder.read_config(download.model_folder(name))
    try:
        with torch.device("meta"):
            return Transformer(Config.from_hf(hf, num_labels=num_labels))
    except (RuntimeError, TypeError) as error:  # of torch.empty
        raise ValueError(f"{name}: no model has config.json's sizes: {one_line(error)}") from error


def fit_head(config, head, model):
    """({our parameter: tensor}, problems) of the head's tensors."""
    family, parameters = model.config.family, dict(model.named_parameters())
    left, ours, problems = dict(head), {}, []
    for module, saved_as in HEADS[family].items():
        for kind in ("weight", "bias"):
            name, theirs = f"{module}.{kind}", f"{full_path(family, module)}.{kind}"
            expected = parameters.get(name)
            if theirs in left:
                ours[name] = left.pop(theirs)
                if expected is None or expected.shape != ours[name].shape:
                    shape = None if expected is None else tuple(expected.shape)
                    problems.append(f"{name} is {tuple(ours[name].shape)}, the model's is {shape}")
            elif expected is not None and saved_as in (config["modules_to_save"] or ()):
                problems.append(f"{ROOT}{theirs} is in modules_to_save and has no tensor")
    return ours, problems + [f"{ROOT}{name} is no head of a {family} model" for name in left]


def fit(config, found, head, model):
    """What read_folder gives, under our names: ({module: Pair}, {head parameter: …}, problems).

    Args:
        config, found, head: as read_folder returns them.
        model: model.Transformer that they are for; not changed, its values are not read.
    """
    family, places = model.config.family, {}  # full path -> our modules in it
    for i in range(model.config.num_layers):
        for place in [p for p in lora.LINEARS if p in FAMILIES[family].layer]:
            name = f"layers.{i}.{place}"
            places.setdefault(full_path(family, name), []).append(name)
    problems = [
        f"{path} is a target and has no tensors"
        for path in places
        if is_target(config, path) and path not in found
    ]
    pairs = {}
    for path, pair in found.items():
        if path not in places:
            problems.append(f"{path} is no layer that we adapt in a {family} model")
            continue
        weights = {name: model.get_submodule(name).weight for name in places[path]}  # (out, in)
        outs = [len(weight) for weight in weights.values()]
        shape = len(pair.lora_B), pair.lora_A.shape[1]
        wanted = sum(outs), next(iter(weights.values())).shape[1]
        if shape != wanted:
            problems.append(f"{path}: delta W is {shape}, the layer is {wanted}")
            continue
        whole = len(outs) == 1 or pair.magnitude is not None
        magnitudes = [None] * len(outs) if pair.magnitude is None else pair.magnitude.split(outs)
        parts = zip(weights, pair.lora_B.split(outs), magnitudes, strict=True)
        for name, part, magnitude in parts:
            if pair.r and (part.any() or whole):  # all of B, or the rows of q, k or v in c_attn
                pairs[name] = Pair(pair.lora_A, part, pair.scaling, magnitude)
    parameters, more = fit_head(config, head, model)
    return pairs, parameters, problems + more


def read(folder, model):
    """A PEFT LoRA folder in our terms: ({our module: Pair}, {our head parameter: tensor}).

    Args:
        folder: with adapter_config.json and adapter_model.safetensors (or .bin).
        model: model.Transformer that it is for; not changed.

    Raises:
        FileNotFoundError: nothing to read.
        ValueError: what config.read_config refuses; or config, tensors and model disagree: a
            tensor that is missing, unknown, misshapen or not finite, all of them listed.
    """
    config, found, head, problems = read_folder(folder)
    pairs, parameters, more = fit(config, found, head, model)
    if problems + more:
        raise ValueError(f"{folder} does not fit: " + "; ".join(problems + more))
    return pairs, parameters


def refuse_unreadable(folder, name):
    """Raises ValueError where a folder that was written does not read, or not with its model.

    Args:
        folder: of an adapter, whose shortcuts, if it has any, are left out of account.
        name: of the model, as of train.py.
    """
    config, found, head, problems = read_folder(folder)
    places = lora.RESIDUALS + lora.CROSS
    linear = {path: pair for path, pair in found.items() if not path.endswith(places)}
    problems += fit(config, linear, head, shapes_of(name, labels_of(head)))[2]
    if problems:
        raise ValueError("; ".join(problems))


def put(model, pairs, head):
    """LoRALayers for the pairs, and the head, into a model that has no adapters; in place."""
    for name, pair in pairs.items():
        kind = lora.LoRALayer if pair.magnitude is None else DoRA
        layer = kind(*lora.base_of(model, name), r=1, generator=torch.Generator())
        layer.r, layer.scaling = pair.r, pair.scaling  # any rank, also above min(in, out)
        layer.lora_alpha = pair.scaling * pair.r
        layer.lora_A = torch.nn.Parameter(pair.lora_A.clone())  # (r, in)
        layer.lora_B = torch.nn.Parameter(pair.lora_B.clone())  # (out, r)
        if pair.magnitude is not None:
            layer.lora_magnitude = torch.nn.Parameter(pair.magnitude.clone())  # (out,)
        lora.put(model, name, layer)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in head.items():
            parameters[name].copy_(tensor)
    return lora.adapters(model)
