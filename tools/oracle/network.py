"""What the oracle's own answers are computed on: layers of given tensors, and the small network.

    linear_of        a frozen nn.Linear
    layer_of         a LoRALayer
    Network          the small network, as a model that proxies.py, delta_lora.py, relatives/ take
    differentiate    outputs and gradients by autograd

What this file does not do: know which function of the interface asks (ours.py).
"""

import types

import torch
import torch.nn.functional as F
from torch import nn

import lora
from model import Output

PLACES = lora.LINEARS + lora.RESIDUALS + lora.CROSS


def linear_of(weight, bias=None):
    """A frozen nn.Linear of weight (out, in) and bias (out,) or None."""
    outer, inner = weight.shape
    kind = {"bias": bias is not None, "dtype": weight.dtype}
    base = nn.utils.skip_init(nn.Linear, inner, outer, **kind)
    base.weight = nn.Parameter(weight.clone())
    if bias is not None:
        base.bias = nn.Parameter(bias.clone())
    return base.requires_grad_(False)


def layer_of(weight, bias, lora_A, lora_B, lora_alpha, transposed=False):
    """A LoRALayer of given tensors; bias may be None."""
    base = linear_of(weight.T if transposed else weight, bias)
    layer = lora.LoRALayer(base, base.in_features, base.out_features, len(lora_A), lora_alpha)
    layer.lora_A, layer.lora_B = nn.Parameter(lora_A.clone()), nn.Parameter(lora_B.clone())
    return layer


class Network(nn.Module):
    """The small network as a model that proxies.py and delta_lora.py take, a layer a block.

    h = W h + scaling B A h, ReLU between layers; logits are the last h.

    Args:
        layers: list of dicts with weight, lora_A, lora_B, lora_alpha; or of modules.
    """

    head = ()

    def __init__(self, layers):
        super().__init__()
        made = [a if isinstance(a, nn.Module) else layer_of(bias=None, **a) for a in layers]
        weight = made[0].base.weight
        inner = weight.shape[1]
        self.config = types.SimpleNamespace(head="classification", hidden_size=inner)
        table = nn.Embedding(1, inner, dtype=weight.dtype)
        self.word_embeddings = self.position_embeddings = table  # SYNFLOW takes its ones from here
        self.layers = nn.ModuleList(nn.Module() for _ in made)
        for block, layer in zip(self.layers, made, strict=True):
            for place in PLACES:
                setattr(block, place, None)
            block.q_proj = layer
        lora.mark_trainable(self)

    def encode(self, x, mask=None):
        for block in self.layers[:-1]:
            x = F.relu(block.q_proj(x))
        return self.layers[-1].q_proj(x)

    def forward(self, x, labels):
        logits = self.encode(x)
        return Output(logits, F.cross_entropy(logits, labels))


def differentiate(y, grad, wanted):
    """{"y": y, and of each name dL/d(tensor)}, without gradients of their own.

    Args:
        y, grad: the output and dL/dy; or a list of each. wanted: dict name -> tensor or list.
    """
    flat = [t for v in wanted.values() for t in (v if isinstance(v, list) else [v])]
    found = torch.autograd.grad(y, flat, grad, allow_unused=True)
    found = iter(
        [torch.zeros_like(t) if g is None else g for t, g in zip(flat, found, strict=True)]
    )
    result = {"y": [part.detach() for part in y] if isinstance(y, list) else y.detach()}
    for name, tensors in wanted.items():
        is_list = isinstance(tensors, list)
        result[name] = [next(found) for _ in tensors] if is_list else next(found)
    return result
