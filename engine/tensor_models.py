"""Models that tensor ranks know how to share: those that say so themselves, and some of Hugging Face's transformers.

A model of one's own has a method `tensor_plan()` that returns its plan (engine/tensor_plan.py). If it also has an
attribute `readout`, a function of (hidden states, the head's weight, targets or None) that makes the loss, or the
logits without targets, it is replaced by one that needs no whole logits.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .device import model_device
from .experts import MixtureOfExperts
from .groups import Groups
from .mesh import Parallelism
from .randomness import Randomness, draws
from .roles import Role
from .tensor_functions import TensorRanks, enter
from .tensor_layers import IGNORED, Rows, VocabEmbedding, VocabHead, mean_loss, whole_logits
from .tensor_plan import AXIS, Plan, check_optimizer, parallelize


def gpt2_plan(model: Any) -> Plan:
    """GPT2LMHeadModel. Its last norm has to give all tokens: the model views what it gets as long as its input."""
    block, head = "transformer.h.*", model.config.n_embd // model.config.n_head
    if model.config.add_cross_attention:
        raise ValueError("GPT2LMHeadModel with cross-attention has no tensor plan; allowed: without")
    return {
        "transformer.wte": "vocabulary",
        "transformer.h.0": "split",
        f"{block}.attn": "region, divide split_size num_heads",
        f"{block}.attn.c_attn": f"column fused 3 of {head}",
        f"{block}.attn.c_proj": f"row of {head}",
        f"{block}.mlp": "region",
        f"{block}.mlp.c_fc": "column",
        f"{block}.mlp.c_proj": "row",
        f"{block}.ln_?": "norm",
        "transformer.ln_f": "norm, opens",
        "lm_head": "vocabulary inside",
    }


def llama_plan(model: Any) -> Plan:
    """LlamaForCausalLM; Mistral's modules have the same names and arguments."""
    block, head = "model.layers.*", model.model.layers[0].self_attn.head_dim
    return {
        "model.embed_tokens": "vocabulary",
        "model.layers.0": "split",
        f"{block}.self_attn": "region",
        f"{block}.self_attn.[qkv]_proj": f"column of {head}",
        f"{block}.self_attn.o_proj": f"row of {head}",
        f"{block}.mlp": "region",
        f"{block}.mlp.gate_proj": "column",
        f"{block}.mlp.up_proj": "column",
        f"{block}.mlp.down_proj": "row",
        f"{block}.*_layernorm": "norm",
        "model.norm": "norm",
        "lm_head": "vocabulary",
    }


BY_CLASS: dict[str, Callable[[Any], Plan]] = {
    "GPT2LMHeadModel": gpt2_plan,
    "LlamaForCausalLM": llama_plan,
    "MistralForCausalLM": llama_plan,
}
"""Plans of models of transformers, which is not imported here."""


class Planned(NamedTuple):
    """A plan, and the module whose loss is made anew for it: the model, or what it wraps."""

    plan: Plan
    module: nn.Module


def plan_for(model: nn.Module, parallelism: Parallelism) -> Planned:
    """The config's plan, else that of the outermost module that has one: its own, or the one for its class.

    Raises:
        ValueError: there is none.
    """
    if parallelism.plan:
        return Planned(dict(parallelism.plan), model)
    for name, module in model.named_modules():
        own, kind = getattr(module, "tensor_plan", None), type(module).__name__
        if own is not None or kind in BY_CLASS:
            plan: Plan = BY_CLASS[kind](module) if own is None else own()
            return Planned({f"{name}.{pattern}" if name else pattern: style for pattern, style in plan.items()}, module)
    raise ValueError(
        f"mp_size (parallel.tensor) = {parallelism.tensor}, but there is no tensor plan for a {type(model).__name__};"
        f" allowed: models with a method tensor_plan(), {', '.join(BY_CLASS)}, or a plan in the config:"
        ' "parallel": {"plan": {"*.fc1": "column", "*.fc2": "row"}}'
    )


def share_layers(
    model: nn.Module,
    parallelism: Parallelism,
    groups: Groups,
    seed: int,
    *,
    optimizer: Any = None,
    keeps_products: bool = False,
) -> Randomness:
    """Cut a model among the tensor ranks of `groups`, if there are several, with rank 0's values.

    Args:
        seed: of dropout.
        optimizer: what the script has made on the parameters, if anything.
        keeps_products: see TensorRanks.

    Returns:
        What the ranks draw in a forward.

    Raises:
        ValueError: there is no plan for the model, or it does not fit the number of ranks.
    """
    group = groups.axis(AXIS)
    shares = group.world > 1
    device = model_device(model)
    samples = (groups.everyone.rank, groups.axis("pipeline").rank)
    randomness = Randomness(device, seed, samples, group.rank, drawn=draws(model), shared=shares)
    if not shares:
        return randomness
    if parallelism.sequence_parallel and any(isinstance(module, MixtureOfExperts) for module in model.modules()):
        raise ValueError(
            "parallel.sequence_parallel with a MixtureOfExperts, whose tensor ranks all route all tokens; allowed: one"
            " of them"
        )
    plan, planned = plan_for(model, parallelism)
    check_optimizer(optimizer if isinstance(optimizer, torch.optim.Optimizer) else None)
    with torch.no_grad():
        groups.replicate([*model.parameters(), *model.buffers()], Role())
        ranks = TensorRanks(group, randomness, parallelism.sequence_parallel, keeps_products)
        parallelize(model, plan, ranks)
    _replace_loss(planned, ranks, own=not parallelism.plan)
    return randomness


def _replace_loss(model: Any, ranks: TensorRanks, *, own: bool) -> None:
    """Have the model's loss made of logits that stay cut, where it is known how the model makes it.

    Args:
        own: the model's own plan was carried out.
    """
    heads = [module for module in model.modules() if isinstance(module, VocabHead | VocabEmbedding)]
    if not heads:
        return
    rows = heads[-1].rows
    if hasattr(model, "readout"):
        if not own:
            raise ValueError(
                f"parallel.plan cuts the vocabulary of a {type(model).__name__}, which has a tensor plan of its own;"
                " leave parallel.plan out"
            )
        model.readout = Readout(rows, ranks)
        return
    head = getattr(model, "lm_head", None)
    causal = getattr(getattr(model, "loss_function", None), "__name__", "") == "ForCausalLMLoss"
    if isinstance(head, VocabHead) and causal:
        model.loss_function = CausalLoss(head, ranks)
        model.register_forward_pre_hook(_KeepsCut(head), with_kwargs=True)


class Readout:
    """Loss, or logits, of hidden states and rows of the head."""

    def __init__(self, rows: Rows, ranks: TensorRanks) -> None:
        self.rows, self.ranks = rows, ranks

    def __call__(self, hidden: Tensor, weight: Tensor, targets: Tensor | None) -> Tensor:
        """Mean cross-entropy (a scalar) with targets [B, S], else logits [B, S, V] on all ranks.

        Args:
            hidden: [B, S, D], or this rank's [B, S / t, D] of it.
            weight: [V / t, D]
        """
        logits = nn.functional.linear(enter(hidden, self.ranks), weight)
        self.ranks.randomness.leave()
        if targets is None:
            return whole_logits(logits, self.rows, self.ranks)
        return mean_loss(logits, targets, self.rows, self.ranks)


class CausalLoss:
    """The loss of a causal language model of transformers: the logits of a token are held against the one after it."""

    def __init__(self, head: VocabHead, ranks: TensorRanks) -> None:
        self.head, self.ranks = head, ranks

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORED,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        return mean_loss(
            logits, shift_labels, self.head.rows, self.ranks, ignored=ignore_index, count=num_items_in_batch
        )


class _KeepsCut:
    """Before a forward: logits stay cut if there are labels, whose loss is all that needs them; else they are whole."""

    def __init__(self, head: VocabHead) -> None:
        self.head = head

    def __call__(self, module: nn.Module, arguments: tuple, keywords: Mapping[str, Any]) -> None:
        self.head.keeps_cut = keywords.get("labels") is not None
