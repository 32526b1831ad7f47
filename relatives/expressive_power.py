"""What LoRA can express: of deep linear nets, all that its ranks allow (arXiv 2310.17513).

    E = W' - W_L … W_1                what the frozen net lacks of a target W'
    min || W' - (W_L + B_L A_L) … (W_1 + B_1 A_1) ||  =  sigma_{R + 1}(E),      R = r_1 + … + r_L

in the spectral norm. No adapters do better: the product moves by a matrix of rank R at most
(telescope it), and the best of those leaves sigma_{R + 1} (Eckart, Young). adapters() reaches it:
the singular value decomposition of E is cut into L pieces, and layer after layer, from the first,
adds the next piece P_l to the product of the net:

    W_L … W_{l+1} (B_l A_l) D_l = P_l,     D_l = (W_{l-1} + B_{l-1} A_{l-1}) … (W_1 + B_1 A_1)

    name    | symbol | shape
    weights | W_l    | L matrices (n, n), invertible
    target  | W'     | (n, n)
    A, B    |        | (r_l, n), (n, r_l), at scale 1; of more than n ranks the rest is not used

What this file does not do: biases and activations (the paper's Sections 3.3 and 4), training.
"""

import torch


def product(weights, n):
    """W_l … W_1 of a list in the order of the layers; I where it is empty."""
    result = torch.eye(n, dtype=torch.float64)
    for weight in weights:
        result = weight @ result
    return result


def adapters(weights, target, ranks):
    """[(A, B)] of every layer, with which the net is as near to the target as these ranks allow.

    Args:
        weights: list of (n, n) float64, the first layer first. target: (n, n) float64.
        ranks: list of int, of each layer.

    Raises:
        ValueError: a product on the way has no inverse; the theorem excludes it.
    """
    n = len(target)
    U, sigma, Vh = torch.linalg.svd(target - product(weights, n))
    result, adapted, start = [], [], 0
    for i, (weight, r) in enumerate(zip(weights, ranks, strict=True)):
        piece = slice(start, start + r)
        above, below = product(weights[i + 1 :], n), product(adapted, n)
        for matrix in (above, below):
            if torch.linalg.matrix_rank(matrix) < n:
                raise ValueError(f"the layers on one side of layer {i} have no inverse together")
        # B_l = (W_L … W_{l+1})^-1 U_l diag(sigma_l),   A_l = V_l^T D_l^-1
        B = torch.linalg.solve(above, U[:, piece] * sigma[piece])  # (n, r)
        A = torch.linalg.solve(below, Vh[piece], left=False)  # (r, n)
        result.append((A, B))
        adapted.append(weight + B @ A)
        start += r
    return result
