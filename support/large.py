"""Models that are too large as they are: a base in 16 bits, and one that is spread over processes.

    --base-dtype bf16   frozen weights in bfloat16; pairs, heads that train, norms and the optimizer
                        in float32. Matrix products are taken in bfloat16 (torch.autocast); the
                        residual stream and all that leaves the model is float32.
    --shard yes         each block's frozen weights lie in equal parts on all processes (FSDP2,
                        torch.distributed.fsdp.fully_shard). A block is whole only while it
                        computes. What trains, and what is in no block, every process has whole.

A block that is gathered is an exchange, in which every process takes part: all of them have to call
the model equally often (support/distributed.py: even, shares, part).

What this file does not do: weights of fewer than 16 bits, shard the embeddings or the optimizer's
moments (of adapters, they are small), save a sharded base (it equals the pretrained one).
"""

import dataclasses
import functools

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from support import distributed
from support.errors import one_line

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
READ_WHOLE = {  # proxies that a sharded model cannot be scored by -> why
    "synflow": "it copies the model",
    "synflow_released": "it copies the model",
    "grasp": "its second derivative needs blocks that have been given back",
    "grad_norm_slot": "it is about the gradient of whole weights",
    "snip_slot": "it is about the gradient of whole weights",
}
READ_WEIGHTS = ("synflow", "synflow_released", "snip_slot")  # proxies, of the frozen weights

# ----------------------------------------------------------------------------------- a base in bf16


def stays_wide(name, head=()):
    """Whether a parameter stays in float32, and whole: of an adapter, a norm or the head.

    Args:
        name: of the parameter. head: tuple of the modules that are trained for the task.
    """
    module = name.rpartition(".")[0]
    return "lora_" in name or module.endswith("norm") or module in head


def refuse_dtype(base_dtype):
    """Raises ValueError for another name than those of DTYPES."""
    if base_dtype not in tuple(DTYPES):  # a list out of a file has no hash
        raise ValueError(f"base_dtype is {base_dtype!r}, allowed: {', '.join(DTYPES)}")


def cast_base(model, base_dtype):
    """Put the frozen weights into a dtype, in place, before or after lora.inject.

    Back in "fp32" the weights are the rounded numbers, which float32 holds exactly. A relative that
    starts from W (DoRA's norms, LoRA-XS) has to be injected after: it keeps what it made of W.

    Args:
        model: model.Transformer in float32, or one that was cast before.
        base_dtype: "fp32" or "bf16".

    Raises:
        ValueError: another name; or the model is merged.
    """
    refuse_dtype(base_dtype)
    if any(getattr(module, "merged", False) for module in model.modules()):
        raise ValueError("the model is merged: call unmerge(model) first, or B A is rounded with W")
    for name, parameter in model.named_parameters():
        if not stays_wide(name, model.head):
            parameter.data = parameter.data.to(DTYPES[base_dtype])
    for norm in norms_of(model):
        if widened not in norm._forward_pre_hooks.values():
            norm.register_forward_pre_hook(widened)
    model.config = dataclasses.replace(model.config, base_dtype=base_dtype)


def norms_of(module):
    return [m for m in module.modules() if isinstance(m, nn.LayerNorm | nn.RMSNorm)]


def widened(_norm, inputs):
    """A norm's hook: what comes out of a product in 16 bits is normalised in float32."""
    return (inputs[0].to(wide(inputs[0])[1]),)


def in_base_dtype(*names):
    """Decorates model.Transformer: its methods of these names take products in the base's dtype."""

    def decorated(model_class):
        for name in names:
            setattr(model_class, name, autocast(getattr(model_class, name)))
        return model_class

    return decorated


def autocast(method):
    """The same method, whose matrix products are in the base's dtype and its result in float32."""

    @functools.wraps(method)
    def call(model, *args, **options):
        dtype = DTYPES[model.config.base_dtype]
        if dtype == torch.float32:  # no word about a model in float64
            return method(model, *args, **options)
        with torch.autocast(model.word_embeddings.weight.device.type, dtype):
            result = method(model, *args, **options)
        return result.to(wide(result)[1])

    return call


def exact_linear(x, weight):
    """F.linear in the dtype of its weight, also inside a product in 16 bits."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(weight.dtype), weight)


def wide(tensor):
    """(device, dtype) of what trains beside a tensor: its own, and float32 beside 16 bits."""
    return tensor.device, torch.promote_types(tensor.dtype, torch.float32)


def placed(layer, model):
    """An adapter on the model's device, in the dtype that its factors train in."""
    like = model.word_embeddings.weight
    if model.config.base_dtype == "fp32":
        return layer.to(like)
    layer.to(like.device, torch.float32).base.to(like)  # there and back, the base loses nothing
    return layer


# ------------------------------------------------------------------------------------- sharded base


def place(model, device, sharded, resumed=False):
    """Put a model on the device where it computes: whole, or its part of a base that is sharded.

    Args:
        model: model.Transformer, adapters in it. device: torch.device.
        sharded: bool, --shard yes.
        resumed: bool; a run goes on with any number of processes, one of them included.

    Returns:
        list of lines about it; with one process nothing is sharded.

    Raises:
        ValueError: to be sharded in one process alone, and no run that goes on.
        OSError: it does not fit there.
    """
    alone = sharded and distributed.world() == 1
    if alone and not resumed:
        raise ValueError(
            "--shard yes has one process to spread the base over: start two or more with torchrun"
        )
    if sharded and not alone:
        shard(model, device)
    try:
        model.to(device)
    except torch.OutOfMemoryError as error:
        raise OSError(
            f"the model does not fit on {device} ({one_line(error)}): give --base-dtype bf16, a "
            "smaller --model, or another --device"
        ) from error
    return ["--shard yes does nothing in one process: the base is whole"] * alone


def shard(model, device):
    """Spread every block's frozen weights over the processes; the last change to a model.

    Each process keeps 1 / world of the rows of every weight, on the device. Before a block computes
    its weights are gathered, and afterwards all but the own rows are freed, forward and backward.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    group = distributed.group(device.type) or dist.group.WORLD
    mesh = DeviceMesh.from_group(group, device.type)
    for block in model.layers:
        whole = {p for name, p in block.named_parameters() if stays_wide(name)}
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=whole)


def is_sharded(model):
    return any(hasattr(block, "unshard") for block in model.layers)


def bytes_of_parameters(model):
    """(bytes of parameters that this process holds, and that the model has)."""
    held = total = 0
    for parameter in model.parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        held += local.numel() * local.element_size()
        total += parameter.numel() * parameter.element_size()
    return held, total


# ---------------------------------------------------------------------------------------- refusals


def refuse_proxy(name, model):
    """Raises ValueError where a model has not all of its weights in place, and the score needs it.

    They are in parts where it is sharded, and lack what Delta-LoRA's lazy=True adds to the output.
    """
    if name in READ_WHOLE and is_sharded(model):
        raise ValueError(f"{name} cannot score a sharded model: {READ_WHOLE[name]}")
    hooked = [n for n, m in model.named_modules() if n.endswith(".base") and m._forward_hooks]
    if name in READ_WEIGHTS and hooked:
        raise ValueError(
            f"{name} reads weights, and {hooked[0]} has a hook that adds to what its weight gives, "
            "as Delta-LoRA's lazy=True does: score by what reads gradients alone"
        )


def refuse_part(name, weight, instead):
    """Raises ValueError where a module's weight is sharded, with what to do instead."""
    if hasattr(weight, "to_local"):
        raise ValueError(f"{name} has a weight that is sharded over the processes: {instead}")


def refuse_to_move(name, weight):
    """Raises ValueError where Delta-LoRA cannot move a module's weight, but would if it is lazy."""
    refuse_part(name, weight, "give lazy=True to Delta-LoRA")
    if weight.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name} has a weight in {weight.dtype}: most increments would be rounded away, hold "
            "it in float32, or give lazy=True to Delta-LoRA"
        )


def refuse_merge(name, weight, factor):
    """Raises ValueError where B A cannot be added to a weight without loss.

    Args:
        name: of the module. weight: (out, in), of its base. factor: one of its factors.
    """
    refuse_part(name, weight, "load the model in one process to merge")
    if weight.dtype != factor.dtype or weight.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name} has a weight in {weight.dtype}, which would round away most of B A: call "
            'cast_base(model, "fp32") before merge, or model.float()'
        )
