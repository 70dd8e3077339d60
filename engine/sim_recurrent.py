"""Recurrent layers on the `sim` device, in the kernels that libraries for GPUs compute them with.

Where a device has no kernel for them, torch computes a recurrent layer in some ten kernels a step, and adds up the
gradient of each weight step by step. On GPUs the inputs of all steps are multiplied at once, a step is one product with
the hidden state and one element-wise kernel, and each weight's gradient is one product over all steps (Appleyard,
Kocisky and Blunsom 2016, "Optimizing Performance of Recurrent Neural Networks on GPUs", sections 3.1 to 3.3). The FLOPs
are the same. Shapes only: which direction a layer runs in makes no difference, and so is not kept.

Letters: S steps, B batch, I inputs, H hidden, G gates of all hidden units (4 H of an LSTM, 3 H of a GRU, else H).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

KINDS = ("lstm", "gru", "rnn_tanh", "rnn_relu")


@torch.library.custom_op("windtunnel::recurrent_cell", mutates_args=("hidden", "kept"))
def recurrent_cell(
    inputs: Tensor, products: Tensor, bias: Tensor | None, state: Tensor, hidden: Tensor, kept: Tensor
) -> None:
    """All that is element-wise in a step: gates [B, G] of inputs and of `state` [B, H] make `hidden` [B, H].

    Args:
        kept: [B, G + H], gates and state of the cell, which backward reads.
    """
    raise NotImplementedError("windtunnel::recurrent_cell exists on the sim device only")


@torch.library.custom_op("windtunnel::recurrent_cell_backward", mutates_args=("gates",))
def recurrent_cell_backward(gradient: Tensor, carried: Tensor, kept: Tensor, gates: Tensor) -> None:
    """The same in backward: the gradient of the gates [B, G] from those that come from above and from the next step."""
    raise NotImplementedError("windtunnel::recurrent_cell_backward exists on the sim device only")


@recurrent_cell.register_fake
def _(*_: Any) -> None:
    """Nothing is returned."""


@recurrent_cell_backward.register_fake
def _(*_: Any) -> None:
    """Nothing is returned."""


class Recurrence(torch.autograd.Function):
    """One direction of one layer, all of its steps."""

    @staticmethod
    def forward(ctx: Any, inputs_SBG: Tensor, state_BH: Tensor, weight_GH: Tensor, bias_G: Tensor | None) -> Any:
        """Hidden states [S, B, H], and the last state of the cell [B, H]."""
        (steps, batch, gates), hidden = inputs_SBG.shape, weight_GH.shape[1]
        hidden_SBH = inputs_SBG.new_empty(steps, batch, hidden)
        kept = inputs_SBG.new_empty(steps, batch, gates + hidden)
        products_BG = inputs_SBG.new_empty(batch, gates)
        state = state_BH
        for inputs, new, keep in zip(inputs_SBG.unbind(), hidden_SBH.unbind(), kept.unbind(), strict=True):
            torch.mm(state, weight_GH.t(), out=products_BG)
            recurrent_cell(inputs, products_BG, bias_G, state, new, keep)
            state = new
        ctx.save_for_backward(hidden_SBH, kept, weight_GH)
        ctx.set_materialize_grads(False)
        return hidden_SBH, inputs_SBG.new_empty(batch, hidden)

    @staticmethod
    def backward(ctx: Any, gradient_SBH: Tensor | None, _: Tensor | None) -> Any:
        hidden_SBH, kept, weight_GH = ctx.saved_tensors
        (steps, batch, hidden), gates = hidden_SBH.shape, weight_GH.shape[0]
        if gradient_SBH is None:  # a loss of the cell's last state alone
            gradient_SBH = torch.zeros_like(hidden_SBH)
        gates_SBG = kept.new_empty(steps, batch, gates)
        carried_BH = kept.new_empty(batch, hidden)
        made = zip(gradient_SBH.unbind(), kept.unbind(), gates_SBG.unbind(), strict=True)
        for step, (gradient, keep, new) in reversed(list(enumerate(made))):
            recurrent_cell_backward(gradient, carried_BH, keep, new)
            if step or ctx.needs_input_grad[1]:
                torch.mm(new, weight_GH, out=carried_BH)
        every = gates_SBG.flatten(0, 1)
        return (
            gates_SBG,
            carried_BH if ctx.needs_input_grad[1] else None,
            torch.mm(every.t(), hidden_SBH.flatten(0, 1)) if ctx.needs_input_grad[2] else None,
            every.sum(0) if ctx.needs_input_grad[3] else None,
        )


def register(library: torch.library.Library) -> None:
    """Have the sim device's recurrent layers computed here; packed sequences and projections as torch does."""
    for kind in KINDS:
        library.impl(f"{kind}.input", partial(_layers, kind), "AutogradPrivateUse1")


def _layers(
    kind: str,
    inputs: Tensor,
    states: Tensor | Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """Every layer of a recurrent module: (outputs, last hidden states, and of an LSTM the cell's)."""
    directions, each = 1 + bidirectional, 4 if has_biases else 2
    if len(weights) != num_layers * directions * each:  # hidden states are projected
        operator = getattr(torch.ops.aten, kind).input
        given = (inputs, states, weights, has_biases, num_layers, dropout, train, bidirectional, batch_first)
        plain: tuple[Tensor, ...] = operator._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *given)
        return plain
    first = (states if isinstance(states, Tensor) else states[0]).unbind()
    x_SBI = inputs.transpose(0, 1) if batch_first else inputs
    hidden, cells = [], []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            number = layer * directions + direction
            into, around, *biases = weights[number * each : (number + 1) * each]
            gates_SBG = functional.linear(x_SBI, into, biases[0] if biases else None)
            out_SBH, cell = Recurrence.apply(
                gates_SBG, first[number].to(gates_SBG.dtype), around.to(gates_SBG.dtype), biases[1] if biases else None
            )
            outputs.append(out_SBH)
            hidden.append(out_SBH[-1])
            cells.append(cell)
        x_SBI = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        if dropout and train and layer < num_layers - 1:
            x_SBI = functional.dropout(x_SBI, dropout)
    last = (torch.stack(hidden), torch.stack(cells)) if kind == "lstm" else (torch.stack(hidden),)
    return x_SBI.transpose(0, 1) if batch_first else x_SBI, *last
