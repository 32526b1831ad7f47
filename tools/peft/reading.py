"""A PEFT LoRA folder in our terms: read() for a model of ours, put() into it.

Config and tensors are checked against each other and against the model: PEFT itself drops an
unknown tensor in silence, and leaves a missing one at its initial value. GPT-2's c_attn (q, k, v in
one) becomes three pairs with the same A, each with its rows of B. lora_dropout is not taken over:
it does nothing in evaluation.

What this file does not do: embeddings, DoRA, AdaLoRA, quantised layers, several adapters in one
folder: refused by name. Pickled code is never executed.
"""

import math
import re
from pathlib import Path

import torch

import lora
from support import hf_folder
from tools.peft.writing import HEADS, ROOT, Pair, full_path

REFUSED = (  # each changes the function that is computed
    "use_dora",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "use_qalora",
    "alora_invocation_tokens",
    "use_bdlora",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "arrow_config",
    "megatron_config",
)
CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")  # init_lora_weights


def pattern_value(pattern, path, default):
    """The value of the first key that matches a path up to its end, as PEFT looks it up."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return pattern.get(path, default)


def is_regex(text):
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def named(entries, path):
    """Whether target_modules or exclude_modules names a path: a list of ends, or a regex."""
    if isinstance(entries, str):
        return re.fullmatch(entries, path) is not None
    return any(path == e or path.endswith(f".{e}") for e in entries or ())


def refuse_config(config, where):
    """Raises ValueError for anything that changes what is computed and that we do not do."""
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{where}: peft_type {config.get('peft_type')!r}, only 'LORA' is supported"
        )
    for field in REFUSED:
        if config.get(field):
            raise ValueError(f"{where}: {field} = {config[field]!r} is not supported")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{where}: bias = {config['bias']!r} is not supported, only 'none'")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(CHANGES_BASE):
        raise ValueError(
            f"{where}: init_lora_weights = {init!r} changed the base weights; save the adapter in "
            "its converted form (PEFT: path_initial_model_for_weight_conversion)"
        )


def refuse_malformed(config, where):
    """Raises ValueError for fields of the wrong kind."""
    for field, kind in (("r", int), ("lora_alpha", (int, float))):
        value = config.get(field, 8)
        if not isinstance(value, kind) or isinstance(value, bool) or value <= 0:
            raise ValueError(f"{where}: {field} is {value!r}, expected a positive number")
    for field in ("rank_pattern", "alpha_pattern"):
        values = config.get(field) or {}
        numbers = isinstance(values, dict) and all(
            isinstance(v, (int, float)) and v > 0 for v in values.values()
        )
        if not numbers:
            raise ValueError(f"{where}: {field} is {values!r}, expected names with numbers > 0")
        for key in values:
            if not is_regex(key):
                raise ValueError(f"{where}: {field} has {key!r}, no regular expression")
    for field in ("target_modules", "exclude_modules", "modules_to_save"):
        value = config.get(field)
        if value is None and field != "target_modules":
            continue
        names = isinstance(value, list) and all(isinstance(v, str) for v in value)
        if not names and (field == "modules_to_save" or not isinstance(value, str)):
            raise ValueError(f"{where}: {field} is {value!r}, expected a list of names")
        if isinstance(value, str) and not is_regex(value):
            raise ValueError(f"{where}: {field} is {value!r}, no regular expression")


def sort_tensors(tensors):
    """({full path: {"lora_A": …, "lora_B": …}}, {full path of a head parameter: …}, problems)."""
    factors, head, problems = {}, {}, []
    for name, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(ROOT)}(.+)\.(lora_[AB])\.weight", name)
        if not name.startswith(ROOT) or (".lora_" in name and not match):
            problems.append(f"unknown tensor {name}")
        elif not tensor.is_floating_point() or not tensor.isfinite().all():
            problems.append(f"{name} ({tensor.dtype}) is not a tensor of finite numbers")
        elif match:
            factors.setdefault(match[1], {})[match[2]] = tensor.float()
        else:
            head[name.removeprefix(ROOT)] = tensor.float()
    return factors, head, problems


def read_folder(folder):
    """(config, {full path: Pair}, {full path of a head parameter: tensor}, [disagreements]).

    Raises:
        FileNotFoundError, ValueError: nothing to read, or what refuse_config and refuse_malformed
            refuse.
    """
    folder = Path(folder)
    where = folder / "adapter_config.json"
    if not where.is_file():
        raise FileNotFoundError(f"{folder} is no PEFT adapter: it has no adapter_config.json")
    config = hf_folder.read_json(where)
    refuse_config(config, where)
    refuse_malformed(config, where)
    files = [folder / f"adapter_model.{kind}" for kind in ("safetensors", "bin")]
    path = next((p for p in files if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder} has no adapter_model.safetensors")
    factors, head, problems = sort_tensors(hf_folder.read_file(path))
    pairs, targets = {}, config["target_modules"]
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    for module, pair in factors.items():
        if targets != "all-linear" and not named(targets, module):
            problems.append(f"{module} has tensors and is not in target_modules")
        if named(config.get("exclude_modules"), module):
            problems.append(f"{module} has tensors and is in exclude_modules")
        if len(pair) < 2:
            problems.append(f"{module} has no {'lora_B' if 'lora_A' in pair else 'lora_A'}")
            continue
        a, b = pair["lora_A"], pair["lora_B"]
        r = pattern_value(ranks, module, config.get("r", 8))
        if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1] or len(a) != r:
            shapes = f"lora_A {tuple(a.shape)}, lora_B {tuple(b.shape)}"
            problems.append(f"{module}: rank {r} by the config, {shapes}")
            continue
        alpha = pattern_value(alphas, module, config.get("lora_alpha", 8))
        pairs[module] = Pair(a, b, alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r)
    for entry in targets if isinstance(targets, list) else ():
        if not any(named([entry], module) for module in factors):
            problems.append(f"target {entry!r} has no tensors")
    for name in head:
        if not any(f".{m}." in f".{name}" for m in config.get("modules_to_save") or ()):
            problems.append(f"{ROOT}{name} has a tensor and is not in modules_to_save")
    return config, pairs, head, problems


def missing_targets(config, places, found):
    """Problems: layers of the model that the config targets and that have no tensors."""
    layers, problems = config.get("layers_to_transform"), []
    layers = [layers] if isinstance(layers, int) else layers
    for path in places:
        targets, i = config["target_modules"], int(re.search(r"\.(\d+)\.", path)[1])
        wanted = targets == "all-linear" or named(targets, path)
        left_out = named(config.get("exclude_modules"), path) or (layers and i not in layers)
        if wanted and not left_out and path not in found:
            problems.append(f"{path} is a target and has no tensors")
    return problems


def our_head(config, head, model):
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
            elif expected is not None and saved_as in (config.get("modules_to_save") or ()):
                problems.append(f"{ROOT}{theirs} is in modules_to_save and has no tensor")
    return ours, problems + [f"{ROOT}{name} is no head of a {family} model" for name in left]


def read(folder, model):
    """A PEFT LoRA folder in our terms: ({our module: Pair}, {our head parameter: tensor}).

    Args:
        folder: with adapter_config.json and adapter_model.safetensors (or .bin).
        model: model.Transformer that it is for; not changed.

    Raises:
        ValueError: what refuse_config refuses, config and tensors that disagree, a module that the
            model lacks or that we do not adapt, a wrong shape: all of them listed.
    """
    config, found, head, problems = read_folder(folder)
    family, places = model.config.family, {}  # full path -> our modules in it
    for i in range(model.config.num_layers):
        for place in lora.LINEARS:
            name = f"layers.{i}.{place}"
            places.setdefault(full_path(family, name), []).append(name)
    problems += missing_targets(config, places, found)
    pairs = {}
    for path, pair in found.items():
        ours = places.get(path, ())
        if not ours:
            problems.append(f"{path} is no layer that we adapt in a {family} model")
        for name, part in zip(ours, pair.lora_B.chunk(max(1, len(ours))), strict=False):
            linear = model.get_submodule(name)  # part: all of B, or the rows of q, k or v in c_attn
            shape, wanted = (len(part), pair.lora_A.shape[1]), tuple(linear.weight.shape)
            if shape != wanted:
                problems.append(f"{path}: delta W is {shape}, the layer is {wanted}")
            elif part.any() or len(ours) == 1:
                pairs[name] = Pair(pair.lora_A, part, pair.scaling)
    parameters, more = our_head(config, head, model)
    if problems + more:
        raise ValueError(f"{folder} does not fit: " + "; ".join(problems + more))
    return pairs, parameters


def put(model, pairs, head):
    """LoRALayers for the pairs, and the head, into a model that has no adapters; in place."""
    for name, pair in pairs.items():
        parent, _, place = name.rpartition(".")
        base = model.get_submodule(name)
        sizes = (base.in_features, base.out_features)
        layer = lora.LoRALayer(base, *sizes, 1)
        layer.r, layer.scaling = pair.r, pair.scaling
        layer.lora_alpha = pair.scaling * pair.r
        layer.lora_A = torch.nn.Parameter(pair.lora_A.to(base.weight).clone())
        layer.lora_B = torch.nn.Parameter(pair.lora_B.to(base.weight).clone())
        setattr(model.get_submodule(parent), place, layer)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in head.items():
            parameters[name].copy_(tensor)
    return lora.adapters(model)
