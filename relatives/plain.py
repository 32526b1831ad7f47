"""What the relatives are compared with: LoRA's pairs, trained by AdamW.

What this file does not do: anything new.
"""

import torch

import lora


def adamw(model, lr, weight_decay):
    """AdamW over all that trains, fused: a loop over a few dozen small tensors costs 3 % of a step.

    Args:
        model: model.Transformer with adapters. lr: learning rate. weight_decay: decoupled.
    """
    parameters = lora.trainable(model).values()
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)
