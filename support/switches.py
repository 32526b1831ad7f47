"""The switches of a LoRA module: single ranks that are off, and what a state_dict says of them all.

    name      | symbol   | shape
    A, B      | A, B     | (r, in), (out, r)   of the module
    ranks_off | k        | the rank-one parts B_k A_k that are off, list of indices

    key            | content, in a state_dict beside the factors
    lora_switches  | (3 + r,) bool: on, merged, frozen when off; then of each rank whether it is off
    lora_scaling   | (), float64

What this file does not do: switch (relatives/single_ranks.py), files (adapter_file.py,
checkpoint.py).
"""

import torch


def by_rank(A, B, ranks_off, when_off):
    """The pair of a module some of whose ranks are off, as the forward pass takes it.

    Args:
        A, B: (r, in), (out, r). ranks_off: list of indices, not empty.
        when_off: "out" or "frozen".

    Returns:
        (A, B) of the ranks that are on, (R, in) and (out, R); with "frozen" of all ranks, those
        that are on before the others, which get no gradient.
    """
    on = [k for k in range(len(A)) if k not in ranks_off]
    if when_off == "out":
        return A[on], B[:, on]  # (R, in), (out, R)
    # B A = sum over k on of B_k A_k  +  sum over k off of B_k A_k, the second held constant
    still_A, still_B = A.detach()[ranks_off], B.detach()[:, ranks_off]
    return torch.cat([A[on], still_A]), torch.cat([B[:, on], still_B], 1)  # (r, in), (out, r)


# ---------------------------------------------------------------------------------- in a state_dict


def join_state_dict(layer):
    """From now on a state_dict of the module carries its switches, and loading one sets them."""
    layer.register_state_dict_post_hook(save)
    layer.register_load_state_dict_pre_hook(load)


def of(layer):
    """dict key -> tensor, of a LoRALayer as it is."""
    off = [k in layer.ranks_off for k in range(layer.r)]
    flags = [layer.enabled, layer.merged, layer.when_off == "frozen", *off]
    scaling = torch.tensor(layer.scaling, dtype=torch.float64)
    return {"lora_switches": torch.tensor(flags), "lora_scaling": scaling}


def save(layer, state_dict, prefix, _metadata):
    """The hook of state_dict()."""
    state_dict |= {prefix + key: value for key, value in of(layer).items()}


def load(layer, state_dict, prefix, _metadata, _strict, missing, *_rest):
    """The hook of load_state_dict(): switch the module as the saved one was.

    Raises:
        ValueError: it would not compute what that one did. What stands before it in the model is
            loaded by then: take a freshly loaded model.
    """
    found = {key: state_dict.pop(prefix + key, None) for key in of(layer)}
    lacking = [prefix + key for key, value in found.items() if value is None]
    missing += lacking
    if lacking:
        return
    refuse_other(layer, prefix[:-1], found)
    on, _, frozen, *off = found["lora_switches"].tolist()
    layer.enabled, layer.when_off = on, "frozen" if frozen else "out"
    layer.ranks_off = [k for k, rank_off in enumerate(off) if rank_off]


def refuse_other(layer, name, found):
    """Raises ValueError where the saved module computes what this one could not, once loaded."""
    ranks, scaling = len(found["lora_switches"]) - 3, found["lora_scaling"].item()
    if ranks != layer.r or scaling != layer.scaling:
        raise ValueError(
            f"{name} has r {layer.r} and scaling {layer.scaling}, the state_dict {ranks} and "
            f"{scaling}: inject with the same r and lora_alpha"
        )
    if found["lora_switches"][1] or layer.locked:
        raise ValueError(
            f"{name} is merged, in the state_dict or in the model: call unmerge(model) on that "
            "side, and save anew"
        )
