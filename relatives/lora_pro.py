"""LoRA-Pro: the two gradients that together come nearest to the full one (arXiv 2407.18242).

    min ||E - G||_F  over  E = s B gA' + s gB' A,       G = dL/dW,   gA = s B^T G,  gB = s G A^T

    gA' = 1/s^2 (B^T B)^-1 gA + X A
    gB' = 1/s^2 (I - P_B) gB (A A^T)^-1 - B X,          P_B = B (B^T B)^-1 B^T     (Theorem 2.1)
    E   = P_B G + (I - P_B) G P_A                       whatever X is
    X     makes ||gA' - gA||^2 + ||gB' - gB||^2 least:                             (Theorem 2.3)
          B^T B X + X A A^T = -1/s^2 (B^T B)^-1 gA A^T

    name | symbol   | shape
    X    | X        | (r, r)    a Sylvester equation with symmetric positive sides: closed form
    s    | alpha/r  | number

Then AdamW, with moments of the size of A and B, each module's step counted from 1.

deviates: the inverses are pseudo-inverses, where the published code adds 1e-8 to the diagonal; so
E does not change with (R A, B R^-1), and B = 0, where gA is 0, needs no branch: gA' = 0 and
gB' = 1/s^2 gB (A A^T)^-1. Gram matrices are inverted in float64: squares halve the digits. Adam's
moments are of gA' and gB', as small as LoRA's: the authors keep those of E itself, two dense
(out, in) matrices a module, and project what Adam makes of them once more onto A and B, a step that
is blind to the basis of the ranks to first order. Ours is another step, and sees it. It also holds
A back: gA' is about 1/||B||, so from B = 0 it is largest in the first steps, which Adam's second
moment remembers for a thousand more. Meanwhile A moves by about lr / sqrt(t), and mostly B trains.

What this file does not do: the authors' step (whose released bias correction is one step ahead, so
that its first update is 0.744 of the usual one).
"""

import torch

from relatives.plain import OtherGradients

CUTOFF = 1e-12  # of an eigenvalue of a Gram matrix, beside the largest: 1e-6 of a singular value


def spectrum(gram):
    """(eigenvalues (r,), eigenvectors (r, r), pseudo-inverse (r, r)) of a Gram matrix."""
    values, vectors = torch.linalg.eigh(gram)
    kept = values > CUTOFF * values[-1]
    inverse = torch.where(kept, 1 / values, 0.0)  # (r,)
    return torch.where(kept, values, 0.0), vectors, vectors * inverse @ vectors.T


def sylvester(first, second, right):
    """X with F X + X S = C, for symmetric F, S without negative eigenvalues; (r, r) each.

    Args:
        first, second: what spectrum gives of F and of S. right: C.
    """
    (f, U, _), (s, V, _) = first, second
    sums = f[:, None] + s  # (r, r)
    # X = U ((U^T C V)_ij / (f_i + s_j)) V^T
    inner = torch.where(sums > 0, (U.T @ right @ V) / sums, 0.0)  # (r, r)
    return U @ inner @ V.T


def nearest(A, B, grad_A, grad_B, scaling):
    """gA', gB' in place of gA, gB.

    Args:
        A, B: (r, in), (out, r). grad_A, grad_B: as A, B. scaling: s.
    """
    dtype, s = A.dtype, scaling
    A, B, gA, gB = (x.double() for x in (A, B, grad_A, grad_B))
    of_B, of_A = spectrum(B.T @ B), spectrum(A @ A.T)
    # (B^T B)^-1 gA / s^2,  and gB (A A^T)^-1 / s^2 outside the columns of B
    new_A = of_B[2] @ gA / s**2  # (r, in)
    new_B = gB @ of_A[2] / s**2  # (out, r)
    new_B = new_B - B @ (of_B[2] @ (B.T @ new_B))  # (out, r)
    X = sylvester(of_B, of_A, -new_A @ A.T)  # (r, r)
    return (new_A + X @ A).to(dtype), (new_B - B @ X).to(dtype)


def optimizer(model, lr, weight_decay):
    """AdamW on the nearest gradients; arguments as in plain.adamw."""
    return OtherGradients(model, lr, weight_decay, nearest)
