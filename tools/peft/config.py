"""What adapter_config.json may say: one table, checked once, before anything is built from it.

    FIELDS    read here: each has a check, the words for what it allows, and PEFT's default
    ADALORA   the same, where peft_type is ADALORA and they differ
    IGNORED   never change the function that is computed; SCHEDULE, of AdaLoRA's training, neither
    others    refused, unless they are empty: biases, layer replication and whatever a later
              PEFT may bring change the function, and to leave them out would be silent

PEFT itself checks little: `lora_alpha: Infinity` loads, an unknown field gives a warning.

What this file does not do: read tensors, compare config and tensors (reading.py).
"""

import re
import sys

from support import hf_folder

PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # of init_lora_weights
IGNORED = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "fan_in_fan_out",  # the module's type decides, as in PEFT
    "inference_mode",
    "layers_pattern",
    "loftq_config",
    "lora_dropout",  # does nothing in evaluation
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
)
SCHEDULE = (
    "beta1",
    "beta2",
    "deltaT",
    "orth_reg_weight",
    "target_r",
    "tfinal",
    "tinit",
    "total_step",
)


# ------------------------------------------------------------------------------------------- checks


def is_rank(value):
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_alpha(value):
    """A number above 0 that is finite as a float; true and NaN are none."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value <= sys.float_info.max


def is_regex(text):
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def is_names(value):
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def is_names_or_regex(value):
    return is_names(value) or (isinstance(value, str) and is_regex(value))


def ending(key):
    """The regular expression that PEFT makes of a key of rank_pattern or alpha_pattern."""
    return rf"(.*\.)?({key})$"


def is_pattern(is_value):
    """A check of rank_pattern or alpha_pattern: {regular expression: value}, or null."""

    def check(value):
        return value is None or (
            isinstance(value, dict)
            and all(is_regex(ending(key)) and is_value(number) for key, number in value.items())
        )

    return check


def is_masks(value):
    """A rank_pattern of AdaLoRA: {path of lora_E: [whether each rank is kept]}, or null."""
    return value is None or (
        isinstance(value, dict)
        and all(key.endswith(".lora_E") for key in value)
        and all(isinstance(mask, list) for mask in value.values())
        and all(isinstance(kept, bool) for mask in value.values() for kept in mask)
    )


def is_layers(value):
    indices = value if isinstance(value, list) else [value]
    return value is None or all(isinstance(i, int) and not isinstance(i, bool) for i in indices)


FIELDS = {  # field -> (check, what is allowed, default where it is absent; ... = it must be there)
    "peft_type": (lambda value: value in ("LORA", "ADALORA"), "'LORA' or 'ADALORA'", ...),
    "r": (is_rank, "an integer, 1 or more", 8),
    "lora_alpha": (is_alpha, "a finite number above 0", 8),
    "rank_pattern": (is_pattern(is_rank), "regular expressions with integers, 1 or more", None),
    "alpha_pattern": (is_pattern(is_alpha), "regular expressions with finite numbers > 0", None),
    "use_rslora": (lambda value: isinstance(value, bool), "true or false", False),
    "use_dora": (lambda value: isinstance(value, bool), "true or false", False),
    "target_modules": (is_names_or_regex, "a list of names, or a regular expression", ...),
    "exclude_modules": (
        lambda value: value is None or is_names_or_regex(value),
        "a list of names, or a regular expression",
        None,
    ),
    "modules_to_save": (lambda value: value is None or is_names(value), "a list of names", None),
    "layers_to_transform": (is_layers, "an integer, or a list of integers", None),
    "bias": (lambda value: value == "none", "'none'", "none"),
    "init_lora_weights": (
        lambda value: value in PLAIN_STARTS,
        "true, false, 'gaussian', 'eva' or 'orthogonal' (pissa, olora, corda, loftq and lora_ga "
        "change the base weights: save the adapter with path_initial_model_for_weight_conversion)",
        True,
    ),
}
ADALORA = {  # r, alpha_pattern and use_rslora are checked, and then not used: PEFT does not either
    "init_r": (is_rank, "an integer, 1 or more", 12),
    "rank_pattern": (is_masks, "lists of true and false, by paths that end in .lora_E", None),
    "use_dora": (lambda value: value is False, "false: AdaLoRA has no DoRA", False),
}


def read_config(path):
    """adapter_config.json, checked; what is read here alone, defaults filled in.

    Raises:
        ValueError: the first field that is wrong: what it is, and what is allowed.
    """
    given, config = hf_folder.read_json(path), {}
    adalora = given.get("peft_type") == "ADALORA"
    fields = FIELDS | ADALORA if adalora else FIELDS
    ignored = IGNORED + SCHEDULE if adalora else IGNORED
    for field, (check, allowed, default) in fields.items():
        value = given.get(field, default)
        if value is ... or not check(value):
            shown = "missing" if value is ... else repr(value)[:80]
            raise ValueError(f"{path}: {field} is {shown}, allowed: {allowed}")
        config[field] = value
    for field, value in given.items():
        if field not in fields and field not in ignored and value:
            raise ValueError(
                f"{path}: {field} = {repr(value)[:80]} is not supported: it may change the function"
            )
    return config


# ------------------------------------------------------------------------------------------ look-up


def pattern_value(pattern, path, default):
    """The value of the first key that matches a path up to its end, as PEFT looks it up."""
    for key, value in (pattern or {}).items():
        if re.match(ending(key), path):
            return value
    return (pattern or {}).get(path, default)


def names(entries, path):
    """Whether target_modules or exclude_modules names a path: a list of ends, or a regex."""
    if isinstance(entries, str):
        return re.fullmatch(entries, path) is not None
    return any(path == entry or path.endswith(f".{entry}") for entry in entries or ())


def is_target(config, path):
    """Whether the config adapts the module at this path, of a model whose every linear is ours."""
    targets, only = config["target_modules"], config["layers_to_transform"]
    only = [only] if isinstance(only, int) else only
    index = re.search(r"\.(\d+)\.", path)
    # As PEFT has it, a target by its full path is one in any layer.
    whole = isinstance(targets, list) and path in targets
    return (
        (targets == "all-linear" or names(targets, path))
        and not names(config["exclude_modules"], path)
        and (whole or not only or index is None or int(index[1]) in only)
    )
