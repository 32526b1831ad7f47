"""LoRA+: B learns faster than A (arXiv 2402.12354, Section 4).

    A <- A - eta u(gA),    B <- B - rho eta u(gB)        u: AdamW's direction

    name     | symbol | meaning
    lr       | eta    | learning rate of A, of the head and of all that is no B
    ratio    | rho    | learning rate of B over that of A; 16, out of the paper's 2^4
    lr_ratio |        | of a group of parameters, which train.py multiplies its rate by

Weight decay is decoupled, times the rate: B decays rho times as fast, as in the published code.

deviates: the published optimizer (and PEFT's) gives rho to every vector as well, since it tells B
by its name or by its one dimension; here the head, with its biases, learns at eta.

What this file does not do: embeddings, which have a rate of their own there.
"""

import torch

import lora


def optimizer(model, lr, weight_decay, ratio=16):
    """AdamW in two groups.

    Args:
        model: model.Transformer with adapters. lr: of A. weight_decay: decoupled. ratio: rho.
    """
    slow, fast = {}, {}
    for name, parameter in lora.trainable(model).items():
        (fast if ".lora_B" in name else slow)[name] = parameter  # PRoLoRA has two parts of B
    groups = [  # with names: a checkpoint knows by them which is which
        {"params": list(slow.items())},
        # eta_B = rho eta_A
        {"params": list(fast.items()), "lr": ratio * lr, "lr_ratio": ratio},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)
