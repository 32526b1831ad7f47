"""What a state_dict says of a LoRA module beside its factors.

    key            | content
    lora_switches  | (3 + r,) bool: on, merged, frozen when off; then of each rank whether it is off
    lora_scaling   | (), float64

What this file does not do: files (adapter_file.py, checkpoint.py).
"""

import torch


def of(layer):
    """dict key -> tensor, of a LoRALayer as it is."""
    off = [k in layer.ranks_off for k in range(layer.r)]
    flags = [layer.enabled, layer.merged, layer.when_off == "frozen", *off]
    scaling = torch.tensor(layer.scaling, dtype=torch.float64)
    return {"lora_switches": torch.tensor(flags), "lora_scaling": scaling}


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


def put(layer, found):
    """Switch a module as the saved one was."""
    on, _, frozen, *off = found["lora_switches"].tolist()
    layer.enabled, layer.when_off = on, "frozen" if frozen else "out"
    layer.ranks_off = [k for k, rank_off in enumerate(off) if rank_off]
