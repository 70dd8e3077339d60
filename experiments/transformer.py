"""The transformer that a ModelSpec describes, in plain torch: no process groups, no mixed precision, no tricks.

Shapes are in the names: B batch, S sequence, D model width (hidden), F feed-forward width (ffn), H query heads,
K key and value heads, E head size, C the heads of a tensor side by side, V vocabulary.

[Note: built without random numbers]
Building must cost nothing and work on `meta`, under FakeTensorMode and on a simulated device, for 175 B parameters as
well. So the layers here leave their matrices as `empty` made them, and `initialize_weights` fills them where a model
is really trained. Until then a model on a real device computes with whatever its memory held.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..engine.experts import ExpertLinear, MixtureOfExperts
from ..engine.stages import Layer
from ..kernels.attention import shared
from ..kernels.core_attention import head_products, masked_softmax
from .models import ModelSpec

ROPE_BASE = 10_000.0
"""Wavelengths of rotary positions, Su et al. 2021, section 3.2.2. Llama 3 takes 500,000: other angles, same cost."""

INITIAL_STD = 0.02
"""Radford et al. 2018, section 4.1."""


RESIDUAL = ("attention.output.weight", "mlp.down.weight", "mlp.experts.down.weight")
"""Names of projections back into the residual stream."""


class Linear(nn.Linear):
    """nn.Linear, left empty: see [Note: built without random numbers]."""

    def reset_parameters(self) -> None:
        pass


class EmptyExpertLinear(ExpertLinear):
    """ExpertLinear, left empty: see [Note: built without random numbers]."""

    def reset_parameters(self) -> None:
        pass


def linear_of(spec: ModelSpec) -> Callable[[int, int], nn.Module]:
    """What makes the layers of an MLP from their widths: for one of them, or for all experts at once."""
    if spec.experts is None:
        return partial(Linear, bias=spec.bias)
    return partial(EmptyExpertLinear, spec.experts, bias=spec.bias)


class Embedding(nn.Embedding):
    """nn.Embedding, left empty: see [Note: built without random numbers]."""

    def reset_parameters(self) -> None:
        pass


def make_norm(spec: ModelSpec) -> nn.Module:
    if spec.norm == "rmsnorm":
        return nn.RMSNorm(spec.hidden, eps=1e-5)
    return nn.LayerNorm(spec.hidden, eps=1e-5, bias=spec.bias)


class CoreAttention(nn.Module):
    """softmax(Q K^T / sqrt(E)) V of each head: one fused operator, or in separate kernels."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.grouped = spec.kv_heads < spec.heads
        self.causal = spec.attention == "causal"
        self.plain = spec.attention_kernel == "plain"
        self.dropout = spec.dropout

    def forward(self, q_BHSE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, bias_1HSS: Tensor | None) -> Tensor:
        causal = self.causal and bias_1HSS is None  # an additive bias holds the mask itself
        rate = self.dropout if self.training else 0.0
        if not self.plain:
            return functional.scaled_dot_product_attention(
                q_BHSE, k_BKSE, v_BKSE, attn_mask=bias_1HSS, dropout_p=rate, is_causal=causal, enable_gqa=self.grouped
            )
        k_BHSE, v_BHSE = shared(k_BKSE, q_BHSE), shared(v_BKSE, q_BHSE)
        scores_BHSS = head_products(q_BHSE, k_BHSE.mT)
        shares_BHSS = masked_softmax(scores_BHSS, bias_1HSS, causal, q_BHSE.shape[-1] ** -0.5)
        return head_products(dropped(shares_BHSS, rate), v_BHSE)


def dropped(x: Tensor, rate: float) -> Tensor:
    """Dropout; no operator at all where nothing is dropped."""
    return functional.dropout(x, rate) if rate else x


class Attention(nn.Module):
    """Multi-head attention; each key and value head serves H / K neighbouring query heads.

    Attributes:
        rotate: `rotate` below; the engine may put a fused one in its place (engine/fused_modules.py).
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.head_size = spec.head_size
        self.widths = [spec.hidden, spec.kv_heads * spec.head_size, spec.kv_heads * spec.head_size]
        self.core_attention = CoreAttention(spec)
        self.qkv = Linear(spec.hidden, sum(self.widths), bias=spec.bias)
        self.output = Linear(spec.hidden, spec.hidden, bias=spec.bias)
        self.rotate = rotate

    def forward(self, x_BSD: Tensor, rope_2SE: Tensor | None, bias_1HSS: Tensor | None) -> Tensor:
        q_BSD, k_BSC, v_BSC = self.qkv(x_BSD).split(self.widths, dim=-1)
        q_BHSE, k_BKSE, v_BKSE = self._heads(q_BSD), self._heads(k_BSC), self._heads(v_BSC)
        # Here, because hidden states between blocks may be a rank's part of the sequence.
        S = q_BHSE.shape[2]
        if rope_2SE is not None:
            q_BHSE, k_BKSE = self.rotate(q_BHSE, rope_2SE[:, :S]), self.rotate(k_BKSE, rope_2SE[:, :S])
        if bias_1HSS is not None:
            bias_1HSS = bias_1HSS[:, :, :S, :S]
        mixed_BHSE = self.core_attention(q_BHSE, k_BKSE, v_BKSE, bias_1HSS)
        return self.output(mixed_BHSE.transpose(1, 2).flatten(2))

    def _heads(self, x_BSC: Tensor) -> Tensor:
        return x_BSC.unflatten(-1, (-1, self.head_size)).transpose(1, 2)


class GeluMlp(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        linear = linear_of(spec)
        self.up = linear(spec.hidden, spec.ffn)
        self.down = linear(spec.ffn, spec.hidden)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.down(functional.gelu(self.up(x_BSD), approximate="tanh"))


class SwigluMlp(nn.Module):
    """Shazeer 2020 (GLU Variants Improve Transformer), equation 6.

    Attributes:
        gated: `gated` below; the engine may put a fused one in its place (engine/fused_modules.py).
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        linear = linear_of(spec)
        self.gate = linear(spec.hidden, spec.ffn)
        self.up = linear(spec.hidden, spec.ffn)
        self.down = linear(spec.ffn, spec.hidden)
        self.gated = gated

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.down(self.gated(self.gate(x_BSD), self.up(x_BSD)))


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return functional.silu(gate) * up


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.attention_norm = make_norm(spec)
        self.attention = Attention(spec)
        self.mlp_norm = make_norm(spec)
        self.mlp = SwigluMlp(spec) if spec.mlp == "swiglu" else GeluMlp(spec)
        self.dropout = spec.dropout

    def forward(self, x_BSD: Tensor, rope_2SE: Tensor | None = None, bias_1HSS: Tensor | None = None) -> Tensor:
        rate = self.dropout if self.training else 0.0
        x_BSD = x_BSD + dropped(self.attention(self.attention_norm(x_BSD), rope_2SE, bias_1HSS), rate)
        return x_BSD + dropped(self.mlp(self.mlp_norm(x_BSD)), rate)


class ExpertBlock(nn.Module):
    """A Block whose tokens visit some of several MLPs; it returns the load-balance loss as well."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.experts is not None
        assert spec.top_k is not None
        self.attention_norm = make_norm(spec)
        self.attention = Attention(spec)
        self.mlp_norm = make_norm(spec)
        self.mlp = MixtureOfExperts(
            Linear(spec.hidden, spec.experts, bias=False),
            SwigluMlp(spec) if spec.mlp == "swiglu" else GeluMlp(spec),
            top_k=spec.top_k,
            capacity_factor=spec.capacity_factor,
        )
        self.dropout = spec.dropout

    def forward(
        self, x_BSD: Tensor, rope_2SE: Tensor | None = None, bias_1HSS: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        rate = self.dropout if self.training else 0.0
        x_BSD = x_BSD + dropped(self.attention(self.attention_norm(x_BSD), rope_2SE, bias_1HSS), rate)
        mixed_BSD, balance = self.mlp(self.mlp_norm(x_BSD))
        return x_BSD + dropped(mixed_BSD, rate), balance


class Transformer(nn.Module):
    """Embedding, blocks, norm, logits, and the loss if it is given targets.

    Args:
        spec: the sizes and variants.

    Attributes:
        readout: `readout` below; where tensor-parallel ranks share the vocabulary, another one takes its place.
    """

    rope: Tensor | None
    alibi: Tensor | None

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.readout: Callable[[Tensor, Tensor, Tensor | None], Tensor] = readout
        self.embedding = Embedding(spec.vocab, spec.hidden)
        self.positions = Embedding(spec.seq, spec.hidden) if spec.positions == "learned" else None
        block = Block if spec.experts is None else ExpertBlock
        self.blocks = nn.ModuleList([block(spec) for _ in range(spec.layers)])
        self.norm = make_norm(spec)
        self.head = None if spec.tied else Linear(spec.hidden, spec.vocab, bias=False)
        rope = rope_table(spec.seq, spec.head_size) if spec.positions == "rope" else None
        alibi = alibi_bias(spec.heads, spec.seq, spec.attention == "causal") if spec.positions == "alibi" else None
        for name, table in (("rope", rope), ("alibi", alibi)):
            kept = None if table is None else table.to(self.embedding.weight.dtype)
            self.register_buffer(name, kept, persistent=False)

    def forward(
        self, tokens_BS: Tensor, targets_BS: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Mean cross-entropy over all positions in fp32 (a scalar) with targets, else the logits BSV.

        Where there are experts, the loss has `spec.balance` times the sum of the blocks' load-balance losses in it.

        Args:
            tokens_BS: int64; targets_BS: likewise, the tokens that follow them.
            position_ids: int64 [1, S], where the tokens stand in their sequence, if not at its beginning.

        Raises:
            ValueError: longer sequences than the model has positions for.
        """
        x_BSD = self._embed(tokens_BS, position_ids)
        tables = self._tables(x_BSD.dtype, position_ids)
        balances: list[Tensor] = []
        for block in self.blocks:
            x_BSD = block(x_BSD, *tables)
            if isinstance(x_BSD, tuple):
                x_BSD, balance = x_BSD
                balances.append(balance)
        found = self._finish(x_BSD, targets_BS)
        if targets_BS is None or not balances:
            return found
        return found + self.spec.balance * torch.stack(balances).sum()

    def pipeline_layers(self) -> list[Layer]:
        """The embeddings, each block, and the norm with logits and loss."""
        row = _Row(self) if self.spec.experts is None else _BalancedRow(self)
        blocks = [Layer(partial(row.block, n), (f"blocks.{n}",)) for n in range(len(self.blocks))]
        return [
            Layer(row.embed, ("embedding",) if self.positions is None else ("embedding", "positions")),
            *blocks,
            Layer(row.finish, ("norm", "embedding" if self.head is None else "head")),
        ]

    def _embed(self, tokens_BS: Tensor, position_ids: Tensor | None = None) -> Tensor:
        S = tokens_BS.shape[1]
        if self.spec.seq < S:
            raise ValueError(f"model {self.spec.name!r}: got {S} tokens per sequence, but seq = {self.spec.seq}")
        x_BSD: Tensor = self.embedding(tokens_BS)
        places_S = slice(S) if position_ids is None else position_ids[0]
        if self.positions is not None:
            x_BSD = x_BSD + self.positions.weight[places_S]
        return dropped(x_BSD, self.spec.dropout if self.training else 0.0)

    def _tables(self, dtype: torch.dtype, position_ids: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """rope_2SE and bias_1HSS for the longest sequence, or for some positions of one. Cast here, once: a copy made
        in each block would be kept until its backward.
        """
        rope_2SE = self.rope if self.rope is None or position_ids is None else self.rope[:, position_ids[0]]
        return (
            None if rope_2SE is None else rope_2SE.to(dtype),
            None if self.alibi is None else self.alibi.to(dtype),
        )

    def _finish(self, x_BSD: Tensor, targets_BS: Tensor | None = None) -> Tensor:
        head = self.embedding if self.head is None else self.head
        return self.readout(self.norm(x_BSD), head.weight, targets_BS)

    def tensor_plan(self) -> dict[str, str]:
        """How tensor-parallel ranks share the model: engine/tensor_plan.py."""
        head, mlp = self.spec.head_size, "blocks.*.mlp"
        attention: Attention = self.blocks[0].attention  # type: ignore[assignment]
        plan = {
            "embedding": "vocabulary",
            "blocks.0": "split",
            "blocks.*.attention.qkv": f"column fused {'+'.join(map(str, attention.widths))} of {head}",
            "blocks.*.attention.output": f"row of {head}",
            "blocks.*.attention": "region, divide widths",
            f"{mlp}.up": "column",
            f"{mlp}.down": "row",
            mlp: "region",
            "blocks.*_norm": "norm",
            "norm": "norm",
        }
        if self.spec.mlp == "swiglu":
            plan[f"{mlp}.gate"] = "column"
        if self.spec.experts is not None:  # tensor ranks have the experts whole, and compute alike there
            plan = {pattern: style for pattern, style in plan.items() if not pattern.startswith(mlp)}
        if self.head is not None:
            plan["head"] = "vocabulary"
        if self.alibi is not None:
            plan["alibi"] = "cut 1"
        return plan


class _Row:
    """A model as layers that hand hidden states [B, S, D] on."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.embed = model._embed
        self.finish = model._finish

    def block(self, number: int, x_BSD: Tensor, position_ids: Tensor | None = None) -> Any:
        return self.model.blocks[number](x_BSD, *self.model._tables(x_BSD.dtype, position_ids))


class _BalancedRow:
    """Layers of a model with experts: beside the hidden states goes the sum [1] of the blocks' balance losses."""

    def __init__(self, model: Transformer) -> None:
        self.model, self.plain = model, _Row(model)

    def embed(self, tokens_BS: Tensor, position_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x_BSD = self.model._embed(tokens_BS, position_ids)
        return x_BSD, x_BSD.new_zeros(1, dtype=torch.promote_types(x_BSD.dtype, torch.float32))

    def block(
        self, number: int, x_BSD: Tensor, balance_1: Tensor, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x_BSD, more = self.plain.block(number, x_BSD, position_ids)
        return x_BSD, balance_1 + more

    def finish(self, x_BSD: Tensor, balance_1: Tensor, targets_BS: Tensor | None = None) -> Tensor:
        found = self.model._finish(x_BSD, targets_BS)
        return found if targets_BS is None else found + self.model.spec.balance * balance_1.sum()


def readout(hidden_BSD: Tensor, weight_VD: Tensor, targets_BS: Tensor | None) -> Tensor:
    """Mean cross-entropy over all positions, in fp32 or wider (a scalar) with targets, else the logits BSV."""
    logits_BSV = functional.linear(hidden_BSD, weight_VD)
    if targets_BS is None:
        return logits_BSV
    wide = torch.promote_types(logits_BSV.dtype, torch.float32)  # a loss in 16 bits would not see small steps
    return functional.cross_entropy(logits_BSV.to(wide).flatten(0, 1), targets_BS.flatten())


def rope_table(seq: int, head_size: int) -> Tensor:
    """Cosines and sines of the rotary angles, (2, S, E) in fp32; both halves of a head turn by the same angles."""
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
    angles = torch.outer(torch.arange(seq, dtype=torch.float32), ROPE_BASE**-exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x_BHSE: Tensor, rope_2SE: Tensor) -> Tensor:
    """Turn the pair (x[i], x[i + E/2]) by the angle of its position and of i."""
    cosine_SE, sine_SE = rope_2SE.unbind(0)
    first, second = x_BHSE.chunk(2, dim=-1)
    return x_BHSE * cosine_SE + torch.cat((-second, first), dim=-1) * sine_SE


def alibi_bias(heads: int, seq: int, causal: bool) -> Tensor:
    """Additive attention bias (1, H, S, S) in fp32: minus slope times distance; minus infinity at what is hidden.

    Press et al. 2022 (ALiBi), section 3: slopes are 2^(-8 i / H), i = 1 to H, for a power of two H; for other H those
    of the next lower power of two, then every second one of the next higher (their released code).
    Four dimensions, because fused attention takes no three-dimensional mask.
    """
    low = 2 ** math.floor(math.log2(heads))
    exponents_H = torch.cat(
        (
            torch.arange(1, low + 1, dtype=torch.float32) * (-8 / low),
            torch.arange(1, 2 * (heads - low) + 1, 2, dtype=torch.float32) * (-4 / low),
        )
    )
    place_S = torch.arange(seq, dtype=torch.float32)
    ahead_SS = place_S[None, :] - place_S[:, None]
    bias_HSS = torch.exp2(exponents_H)[:, None, None] * -ahead_SS.abs()
    if causal:
        bias_HSS = bias_HSS.masked_fill(ahead_SS > 0, -math.inf)
    return bias_HSS[None]


@torch.no_grad()
def initialize_weights(model: Transformer, seed: int) -> None:
    """Fill parameters and position tables: matrices normal(0, 0.02), norms one, biases zero.

    The projections back into the residual stream are scaled by 1 / sqrt(2 layers) (Radford et al. 2019, section 2.3).
    Numbers are drawn on the CPU in fp32, so that a seed means the same weights on every device and in every precision.
    A model that was built on `meta` and moved by `to_empty` is complete after this.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    residual_std = INITIAL_STD / math.sqrt(2 * model.spec.layers)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        if name.endswith("bias"):  # of experts, a row for each
            parameter.zero_()
            continue
        std = residual_std if name.endswith(RESIDUAL) else INITIAL_STD
        drawn = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
        parameter.copy_(drawn.normal_(0.0, std, generator=generator))
    with torch.device("cpu"):
        if model.rope is not None:
            model.rope.copy_(rope_table(model.spec.seq, model.spec.head_size))
        if model.alibi is not None:
            model.alibi.copy_(alibi_bias(model.spec.heads, model.spec.seq, model.spec.attention == "causal"))


def for_flight(spec: ModelSpec, batch: int, seq: int) -> tuple[Transformer, Callable[[], tuple[Tensor, Tensor]]]:
    """What a flight needs (engine/pilot.py): the model, and a function that makes tokens and targets [batch, seq]."""

    def make_batch() -> tuple[Tensor, Tensor]:
        tokens = torch.empty(batch, seq, dtype=torch.int64)
        return tokens, torch.empty_like(tokens)

    return Transformer(spec), make_batch
