"""Riemannian preconditioning: each gradient through the other factor's metric (arXiv 2402.02347).

    gA <- (B^T B + delta I)^-1 gA,    gB <- gB (A A^T + delta I)^-1,    then AdamW

    name   | symbol | shape
    gA, gB |        | (r, in), (out, r)   dL/dA = s B^T G,  dL/dB = s G A^T
    delta  | delta  | number; at B = 0 there is no inverse without it

With plain gradient descent and delta = 0 the step is the same for (A, B) and (R A, B R^-1), for any
invertible R: to first order s Δ(B A) = -eta s^2 (P_B G + G P_A), with the projections onto the
columns of B and the rows of A. Adam's moments, coordinate by coordinate, do not keep that.

deviates: the published AdamW moves A first and preconditions B's gradient with the new A. Here both
see the old factors, as in the paper's Equation 4 (and PEFT), so that the order does not matter.

What this file does not do: find delta, which the authors tune for each task (1e-6 … 100 on GLUE
with AdamW, elsewhere 0 … 1e8).
"""

import torch

from relatives.plain import OtherGradients


def precondition(A, B, grad_A, grad_B, scaling, delta=1e-2):
    """The two gradients, preconditioned.

    Args:
        A, B: (r, in), (out, r). grad_A, grad_B: as A, B. delta: above 0.
        scaling: not read: it is the same factor in both gradients.
    """
    eye = torch.eye(len(A), dtype=A.dtype, device=A.device)
    # gA <- (B^T B + delta I)^-1 gA
    new_A = torch.linalg.solve(B.T @ B + delta * eye, grad_A)  # (r, in)
    # gB <- gB (A A^T + delta I)^-1
    new_B = torch.linalg.solve(A @ A.T + delta * eye, grad_B, left=False)  # (out, r)
    return new_A, new_B


def optimizer(model, lr, weight_decay):
    """AdamW on the preconditioned gradients; arguments as in plain.adamw."""
    return OtherGradients(model, lr, weight_decay, precondition)
