"""The fourteen exercises of docs/exercises.md: copy this file, and write its functions in order.

    python -m tools.oracle check --only lora_forward --candidate exercises.py

A function that still raises NotImplementedError is reported as "not offered". Use torch as you
like; a function may call the ones before it.
"""


def lora_forward(x, weight, bias, lora_A, lora_B, lora_alpha, transposed):
    """1. x (n, in) -> y (n, out)."""
    raise NotImplementedError


def lora_backward(x, weight, bias, lora_A, lora_B, lora_alpha, transposed, grad):
    """2. grad = dL/dy (n, out) -> {"x": dL/dx, "lora_A": dL/dA, "lora_B": dL/dB}."""
    raise NotImplementedError


def merge(weight, lora_A, lora_B, lora_alpha, transposed):
    """3. The merged weight, in the shape of weight."""
    raise NotImplementedError


def grad_norm(layers, batches):
    """4. [score of each layer]."""
    raise NotImplementedError


def snip(layers, batches):
    """5. [score of each layer]."""
    raise NotImplementedError


def synflow(layers):
    """6. [score of each layer]."""
    raise NotImplementedError


def keep_top(scores, keep, together):
    """7. Set of the names that are on."""
    raise NotImplementedError


def within_budget(scores, costs, budget):
    """8. Set of the names that are on."""
    raise NotImplementedError


def snip_ranks(layers, batches):
    """9. [[score of each rank-one part] of each layer]."""
    raise NotImplementedError


def delta_step(weight, old_A, old_B, new_A, new_B, lora_alpha, ratio):
    """10. The new weight (out, in)."""
    raise NotImplementedError


def delta_adapter(lora_A, lora_B, lora_alpha, ratio, start):
    """11. {"lora_A": (R, in), "lora_B": (out, R)}, R <= 2r."""
    raise NotImplementedError


def short_run(layers, batches, settings):
    """12. {"losses": …, "on": …, "adapters": …, "weights": …}."""
    raise NotImplementedError


def dora(x, weight, bias, lora_A, lora_B, lora_magnitude, lora_alpha, grad):
    """13. {"y": …, and dL/d of "x", "lora_A", "lora_B", "lora_magnitude"}; grad = dL/dy."""
    raise NotImplementedError


def riemannian_step(lora_A, lora_B, gradient, lora_alpha, lr, delta):
    """14. {"lora_A": (r, in), "lora_B": (out, r), "product": (out, in)} after the step."""
    raise NotImplementedError
