"""Which tokens go to which experts: top-k gating with a capacity, tokens laid out by expert, and their return.

    gates     softmax over experts, the k largest kept; their weights add up to 1 for k > 1 (Shazeer et al. 2017,
              section 2.1; GShard, Lepikhin et al. 2021, algorithm 1), and are the gate itself for k = 1 (Switch
              Transformers, Fedus et al. 2022, equation 2), which would else get no gradient
    capacity  an expert takes C tokens; first choices come before second ones, earlier tokens before later ones; who
              finds it full is dropped there, and passes by on the residual path
    balance   E sum_i f_i P_i, with f_i the share of choices that fell on expert i, drops included, and P_i its mean
              gate (Switch, equation 4, whose k is 1): 1 where all are chosen alike

Shapes: T tokens, E experts, k choices, C capacity, D width. All are known beforehand, whatever is chosen.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .attention import wide


class Routing(NamedTuple):
    """What was decided.

    Attributes:
        slots: [k T] int64, choices before tokens: the place of a token among those of all experts, expert * C + number;
            E * C where it was dropped.
        weights: [k T] what each choice counts, 0 where dropped; at least fp32.
        balance: [] the load-balance loss.
        capacity: C.
    """

    slots: Tensor
    weights: Tensor
    balance: Tensor
    capacity: int


def route(logits: Tensor, top_k: int, capacity: int) -> Routing:
    """Gating of tokens with `logits` [T, E]."""
    experts = logits.shape[1]
    gates = logits.to(wide(logits.dtype)).softmax(-1)
    largest, chosen = gates.topk(top_k, dim=-1)
    if top_k > 1:
        largest = largest / largest.sum(-1, keepdim=True)
    chosen, weights = chosen.mT.flatten(), largest.mT.flatten()
    falls_on = chosen[:, None] == torch.arange(experts, device=chosen.device)
    number = (falls_on.cumsum(0) - 1).gather(1, chosen[:, None]).squeeze(1)
    kept = number < capacity
    slots = torch.where(kept, chosen * capacity + number, experts * capacity)
    balance = experts * (falls_on.to(gates.dtype).mean(0) * gates.mean(0)).sum()
    return Routing(slots, weights * kept, balance, capacity)


def dispatch(tokens: Tensor, routing: Routing, experts: int) -> Tensor:
    """Tokens [T, D] by expert [E, C, D]; zeros where an expert has fewer."""
    copies = tokens.repeat(routing.slots.shape[0] // tokens.shape[0], 1)
    places = tokens.new_zeros(experts * routing.capacity + 1, tokens.shape[1])  # the last row is for those dropped
    return places.index_copy(0, routing.slots, copies)[:-1].unflatten(0, (experts, routing.capacity))


def combine(results: Tensor, routing: Routing, tokens: int) -> Tensor:
    """What experts made of their tokens [E, C, D], weighted and added up for each token [T, D]; 0 where all dropped."""
    flat = results.flatten(0, 1)
    flat = torch.cat((flat, flat.new_zeros(1, flat.shape[1])))
    picked = flat.index_select(0, routing.slots) * routing.weights[:, None].to(flat.dtype)
    return picked.unflatten(0, (-1, tokens)).sum(0)
