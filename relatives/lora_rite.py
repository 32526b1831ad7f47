"""LoRA-RITE: Adam whose steps do not change with (R A, B R^-1) (arXiv 2410.20625, Algorithm 1).

Written once for both factors: Z is B or A^T, (n, r), and Y is the other one, (m, r).

    Y = U R                     thin QR: the basis and the size of the other factor
    g = dL/dZ R^-1              the un-magnified gradient
    g <- 0 if rms(g) > 1;  then all g <- g / max(1, norm of all together)
    P = U^T U_before            how the basis has turned since the last step
    V = (1 - b2) g^T g / n + b2 P V P^T
    M = (1 - b1) g V^(-1/2) + b1 M P^T
    Z <- Z - eta (M R^-T + weight decay Z)

    name       | symbol | shape
    exp_avg    | M      | (n, r)
    exp_avg_sq | V      | (r, r)
    basis      | U      | (m, r)
    turn       | P      | (r, r)
    b1, b2     |        | 0.9, 0.999, corrected: b (1 - b^(t-1)) / (1 - b^t), so that M, V are means
    EPS        |        | 1e-6, added to the root: V^(-1/2) has 1 / (sqrt(v) + EPS) of an eigenvalue

A factor whose gradient was set to 0 is still moved by M. What is no pair is trained by AdamW.

Fewer tokens than r in a step: V has rank below r. Rounding then makes an eigenvalue less than 0,
the published code takes its root, which is NaN, and leaves out the whole update without a word.
Here the eigenvalue is 0: g has nothing along it, and the rest of the update is made. An R that is
not of full rank (B = 0 at the start: R = 0, A waits a step) has the pseudo-inverse, cut off at the
precision of its factor.

deviates: in these two; else as published, with the mass that escapes a basis left out (its
default).

What this file does not do: cap updates, balance the norms of A and B (both off there).
"""

import math

import torch

import lora
from relatives.plain import pairs

EPS = 1e-6


def decay(beta, t):
    """Bias-corrected, at step t from 1: 0 at first, beta in the end."""
    return beta * (1 - beta ** (t - 1)) / (1 - beta**t)


def unmagnified(Y, grad):
    """(g (n, r), U (m, r), R^-1 (r, r)) of one factor.

    Args:
        Y: (m, r), the other factor. grad: (n, r), of this one.
    """
    U, R = torch.linalg.qr(Y)
    inverse = torch.linalg.pinv(R, rtol=len(Y) * torch.finfo(Y.dtype).eps)  # (r, r)
    g = grad @ inverse
    # g <- 0 if rms(g) > 1
    return torch.where(g.square().mean().sqrt() > 1, 0.0, g), U, inverse


def direction(g, state, turn, betas):
    """The next M of one factor, (n, r); V moves, and the step is counted.

    Args:
        g: (n, r), clipped. state: of the optimizer. turn: P (r, r). betas: (b1, b2).
    """
    state["step"] += 1
    b1, b2 = (decay(beta, state["step"].item()) for beta in betas)
    # V = (1 - b2) g^T g / n + b2 P V P^T
    V = (1 - b2) * g.T @ g / len(g) + b2 * turn @ state["exp_avg_sq"] @ turn.T  # (r, r)
    state["exp_avg_sq"] = (V + V.T) / 2
    values, vectors = torch.linalg.eigh(state["exp_avg_sq"])
    root = vectors / (values.clamp(min=0).sqrt() + EPS) @ vectors.T  # (r, r)
    # M = (1 - b1) g V^(-1/2) + b1 M P^T
    return (1 - b1) * g @ root + b1 * state["exp_avg"] @ turn.T


class LoRARite(torch.optim.AdamW):
    """LoRA-RITE for the pairs, AdamW for the rest; arguments as in plain.adamw."""

    def __init__(self, model, lr, weight_decay):
        named = lora.trainable(model)  # with names: a checkpoint knows the state by them
        super().__init__(named.items(), lr=lr, weight_decay=weight_decay, fused=True)
        self.pairs = pairs(model)
        for A, B, _ in self.pairs:
            for p, Z, Y in ((A, A.T, B), (B, B, A.T)):
                self.state[p] = {  # from the start: a checkpoint knows its form by it
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(Z, memory_format=torch.contiguous_format),
                    "exp_avg_sq": Z.new_zeros(len(A), len(A)),  # (r, r)
                    "basis": torch.zeros_like(Y, memory_format=torch.contiguous_format),
                }

    @torch.no_grad()
    def step(self):
        """One step; a module that is off has no gradients, and stays as it is."""
        lr, weight_decay, betas = (self.param_groups[0][k] for k in ("lr", "weight_decay", "betas"))
        found = []  # (parameter, Z, g, U, R^-1)
        for A, B, _ in self.pairs:
            if A.grad is not None:
                found.append((A, A.T, *unmagnified(B, A.grad.T)))
                found.append((B, B, *unmagnified(A.T, B.grad)))
                A.grad = B.grad = None  # of the others AdamW takes care
        total = math.hypot(*(g.norm().item() for _, _, g, _, _ in found))
        for p, Z, g, U, inverse in found:
            state = self.state[p]
            turn = U.T @ state["basis"]  # P (r, r)
            state["exp_avg"] = direction(g / max(1.0, total), state, turn, betas)
            state["basis"] = U
            # Z <- Z - eta (M R^-T + weight decay Z)
            Z.sub_(lr * (state["exp_avg"] @ inverse.T + weight_decay * Z))
        super().step()


def optimizer(model, lr, weight_decay):
    """LoRA-RITE; arguments as in plain.adamw."""
    return LoRARite(model, lr, weight_decay)
