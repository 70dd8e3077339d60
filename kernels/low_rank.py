"""PowerSGD: a matrix as a product of two thin factors, found by one power iteration (Vogels et al. 2019, algorithm 1).

    P = orthonormal basis of the columns of M Q        Q' = M^T P        M ~ P Q'^T = P P^T M

An orthogonal projection: || M - P P^T M || <= || M || in Frobenius' norm, and zero (up to rounding) where M has at
most the rank of Q and Q misses none of its row space. Both products are linear in M: summed over ranks they are those
of the sum of the matrices. inf or nan in M reaches every entry of the product.
"""

import torch
from torch import Tensor
from torch.nn import functional


def as_matrix(values: Tensor, columns: int) -> Tensor:
    """[n] as [ceil(n / columns), columns] fp32, zeros at the end of the last row."""
    rows = -(-values.numel() // columns)
    return functional.pad(values.float(), (0, rows * columns - values.numel())).view(rows, columns)


def start_factor(columns: int, rank: int, device: torch.device) -> Tensor:
    """Q [columns, rank] fp32 to begin with, the same on every rank: pseudo-random in [-1/2, 1/2).

    The paper draws from a normal distribution; any Q that misses no direction of interest does, and the next steps
    begin with the last Q'. This one needs no generator, whose numbers differ between devices.
    """
    column = torch.arange(columns, dtype=torch.float32, device=device)[:, None]
    phase = column * 12.9898 + torch.arange(rank, dtype=torch.float32, device=device) * 78.233
    return (torch.sin(phase) * 43758.5453).frac().abs() - 0.5


def orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis [m, r] of the space of the columns of [m, r], r <= m (Householder's QR: rank may lack)."""
    return torch.linalg.qr(columns).Q
