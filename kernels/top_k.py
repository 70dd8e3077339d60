"""The k values of largest magnitude and where they were; the rest counts as zero.

The error is || x - C(x) ||^2 <= (1 - k / n) || x ||^2 (Stich et al. 2018, Sparsified SGD with Memory, lemma A.1), and
zero where at most k values are not. nan counts as largest, then inf: they are never left out in favour of a number.

Shapes: any leading dimensions, chosen along the last one. Bytes: 8 for each value kept.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Sparse(NamedTuple):
    """Places [..., k] int32 (so n < 2^31) and fp32 values [..., k]."""

    places: Tensor
    values: Tensor


def largest_k(values: Tensor, k: int) -> Sparse:
    """The `k` entries of largest magnitude of `values` [..., n], 0 <= k <= n, of any floating dtype."""
    places = values.abs().topk(k, dim=-1, sorted=False).indices
    return Sparse(places.to(torch.int32), values.gather(-1, places).float())


def scatter_k(sparse: Sparse, elements: int) -> Tensor:
    """fp32 values [..., elements]: zeros but at the places kept."""
    dense = sparse.values.new_zeros((*sparse.values.shape[:-1], elements))
    return dense.scatter_(-1, sparse.places.long(), sparse.values)
