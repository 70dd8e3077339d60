"""A transformer as numbers: the catalogue, model files, parameter and flop counts. No torch here.

`load_model("gpt2")` reads the catalogue beside this file, `load_model("mine.toml")` a file with the same keys:
`layers hidden heads kv_heads ffn vocab seq mlp norm positions attention tied bias`, optionally `experts top_k
capacity_factor balance dropout attention_kernel`, and `base = "NAME"` to take what is not given from a model of the
catalogue.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from ..reading import nearest, read_toml

CATALOGUE = Path(__file__).parent / "catalogue" / "models.toml"

CHOICES: dict[str, tuple[str, ...]] = {
    "mlp": ("gelu", "swiglu"),
    "norm": ("layernorm", "rmsnorm"),
    "positions": ("learned", "rope", "alibi", "none"),
    "attention": ("causal", "full"),
    "attention_kernel": ("fused", "plain"),
}
SIZES = ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "seq", "experts", "top_k")
FLAGS = ("tied", "bias")
NUMBERS = {"capacity_factor": "> 0", "balance": ">= 0", "dropout": ">= 0"}
OPTIONAL = frozenset(
    {"kv_heads", "ffn", "experts", "top_k", "capacity_factor", "balance", "dropout", "attention_kernel"}
)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A pre-norm transformer; `transformer.Transformer` is the module that it describes.

    Attributes:
        name: what tables and errors call it.
        layers: repeated blocks.
        hidden: model width.
        heads: query heads; each is hidden / heads wide.
        kv_heads: key and value heads, each shared by heads / kv_heads query heads; default heads.
        ffn: inner width of the feed-forward layer; default 4 * hidden.
        vocab: rows of the token embedding, padding rows included.
        seq: the longest sequence, in tokens.
        mlp: "gelu" (two matrices) or "swiglu" (three).
        norm: "layernorm" or "rmsnorm"; two in each block and one before the logits.
        positions: "learned" (a table of seq rows), "rope", "alibi" or "none".
        attention: "causal" or "full".
        tied: the logits use the token embedding.
        bias: each linear layer of a block and each layernorm has a bias; the logits never have one.
        experts: feed-forward experts in each block; None for one that all tokens visit.
        top_k: experts that each token visits.
        capacity_factor: room of an expert, in shares of what it gets where all are chosen alike (kernels/gating.py).
        balance: what the load-balance loss of each block counts in the loss; default that of Fedus et al. 2022.
        dropout: of attention probabilities and of what attention and feed-forward add to the hidden states.
        attention_kernel: "fused" (one kernel that keeps no scores, Dao et al. 2022) or "plain" (products of heads, a
            masked softmax and dropout, each a kernel of its own).
        source: where the numbers come from.

    Raises:
        ValueError: a field of the wrong type or out of range, or sizes that do not divide.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int = None  # type: ignore[assignment]  # filled in below: it follows from heads
    ffn: int = None  # type: ignore[assignment]  # filled in below: it follows from hidden
    vocab: int
    seq: int
    mlp: str
    norm: str
    positions: str
    attention: str
    tied: bool
    bias: bool
    experts: int | None = None
    top_k: int | None = None
    capacity_factor: float = 1.25
    balance: float = 0.01
    dropout: float = 0.0
    attention_kernel: str = "fused"
    source: str = ""

    def __post_init__(self) -> None:
        for field in SIZES:
            if getattr(self, field) is not None or field not in OPTIONAL:
                self._check_size(field)
        for field, value in (("kv_heads", self.heads), ("ffn", 4 * self.hidden)):
            if getattr(self, field) is None:
                object.__setattr__(self, field, value)
        for field, least in NUMBERS.items():
            value = getattr(self, field)
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or value < 0
                or (value == 0 and "=" not in least)
            ):
                raise ValueError(f"{self._naming(field)} must be a number {least}")
        if self.dropout >= 1:
            raise ValueError(f"{self._naming('dropout')} must be a number >= 0 and < 1")
        for field, allowed in CHOICES.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{self._naming(field)} must be one of {', '.join(map(repr, allowed))}")
        for field in FLAGS:
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{self._naming(field)} must be true or false (without quotes)")
        self._check_divisions()

    def _naming(self, field: str) -> str:
        return f"model {self.name!r}: {field} = {getattr(self, field)!r}"

    def _check_size(self, field: str) -> None:
        value = getattr(self, field)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{self._naming(field)} must be a whole number (without quotes or a decimal point)")
        if value < 1:
            raise ValueError(f"{self._naming(field)} must be >= 1")

    def _check_divisions(self) -> None:
        if self.hidden % self.heads:
            raise ValueError(f"{self._naming('hidden')} must be a multiple of heads = {self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self._naming('kv_heads')} must divide heads = {self.heads}")
        if self.positions == "rope" and self.head_size % 2:
            raise ValueError(
                f"{self._naming('positions')} turns pairs and needs an even hidden / heads, got {self.head_size}"
            )
        if (self.experts is None) != (self.top_k is None):
            given, missing = ("experts", "top_k") if self.top_k is None else ("top_k", "experts")
            raise ValueError(f"{self._naming(given)} needs {missing} beside it")
        if self.experts is not None and self.top_k is not None and self.top_k > self.experts:
            raise ValueError(f"{self._naming('top_k')} must be <= experts = {self.experts}")

    @property
    def counts(self) -> str:
        """What a step's tokens are: tokens."""
        return "tokens"

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.hidden // self.heads

    @property
    def parameters(self) -> int:
        """Number of parameters, a tied embedding counted once; equal to the module's count (tests/test_models.py).

        For a GPT with 4 h wide feed-forward layers it is 12 l h^2 (1 + 13 / (12 h) + (V + s) / (12 l h)) of Narayanan
        et al. 2021 (SC '21, equation 2), plus 2 h for the last norm, which they leave out.
        """
        norm = self.hidden * (2 if self.norm == "layernorm" and self.bias else 1)
        experts = self.experts or 1
        biases = (self._qkv_width + self.hidden) + experts * ((self._ffn_matrices - 1) * self.ffn + self.hidden)
        block = self._block_matrix_elements(experts) + 2 * norm + (biases if self.bias else 0)
        positions = self.seq * self.hidden if self.positions == "learned" else 0
        tables = self.vocab * self.hidden * (1 if self.tied else 2) + positions
        return self.layers * block + norm + tables

    @property
    def matmul_flops_per_token(self) -> int:
        """Forward flops of a token in the linear layers and the logits, attention scores left out.

        2 m n k for a matrix product of (m, k) by (k, n), hence two per matrix element and token (Kaplan et al. 2020,
        section 2.1, where it is 2 N). Of experts those that a token visits are counted, without the room that others
        leave.
        """
        return 2 * (self.layers * self._block_matrix_elements(self.top_k or 1) + self.hidden * self.vocab)

    def forward_flops(self, batch: int, seq: int) -> int:
        """Flops of a forward pass over `batch` sequences of `seq` tokens: matrix products only, logits included.

        Causal attention is counted in full: 2 B s^2 h each for the scores and for the weighted sum. For a GPT this is
        24 B s l h^2 (1 + s / (6 h)) + 2 B s h V (Narayanan et al. 2021, SC '21, appendix "Floating-point operations").
        The backward pass is twice as much.
        """
        attention = 4 * seq * self.hidden * self.layers
        return batch * seq * (self.matmul_flops_per_token + attention)

    @property
    def _qkv_width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_size

    @property
    def _ffn_matrices(self) -> int:
        return 3 if self.mlp == "swiglu" else 2

    def _block_matrix_elements(self, experts: int) -> int:
        """Of a block with so many experts counted, and its gate if it has one."""
        gate = self.experts or 0
        return self.hidden * (self._qkv_width + self.hidden + experts * self._ffn_matrices * self.ffn + gate)


KEYS = tuple(field.name for field in fields(ModelSpec))


def model_names() -> list[str]:
    """Names of the catalogue, in its order."""
    return list(_catalogue())


def load_model(name_or_path: str | Path) -> ModelSpec:
    """The model of that name in the catalogue, or the one that a TOML file describes.

    Raises:
        ValueError: no such model or file, a file that is not TOML, an unknown or missing key, or a value that
            `ModelSpec` refuses; one line.
    """
    text = str(name_or_path)
    if text in _catalogue():
        return _spec_of(text, _catalogue()[text], f"the catalogue's {text}")
    path = Path(name_or_path)
    if path.suffix == ".toml" or path.is_file():
        return _spec_of(path.stem, read_toml(path), f"model file {path}")
    raise ValueError(
        f"model = {text!r} is neither a catalogue name (`windtunnel models` lists them) nor the path of a .toml file,"
        f" nor MODULE:FUNCTION{nearest(text, _catalogue())}"
    )


@cache
def _catalogue() -> dict[str, dict[str, Any]]:
    return read_toml(CATALOGUE)


def _spec_of(name: str, table: Mapping[str, Any], where: str) -> ModelSpec:
    """Check the keys of `table`, fill in those of its base, and leave the values to `ModelSpec`."""
    for key in table:
        if key not in KEYS and key != "base":
            raise ValueError(f"{where}: unknown key {key!r}; allowed: base, {', '.join(KEYS)}{nearest(key, KEYS)}")
    for key in ("name", "source", "base"):
        if not isinstance(table.get(key, ""), str):
            raise ValueError(f"{where}: {key} = {table[key]!r} must be text in quotes")
    merged = {"source": where} | _inherited(table.get("base"), where) | {"name": name} | dict(table)
    merged.pop("base", None)
    missing = [key for key in KEYS if key not in merged and key not in OPTIONAL]
    if missing:
        raise ValueError(f"{where}: missing {' '.join(missing)}; add {missing[0]} = ... or name a base model")
    return ModelSpec(**merged)


def _inherited(base: str | None, where: str) -> dict[str, Any]:
    """What a model takes from its base: all that the base gives, except for its source."""
    if base is None:
        return {}
    if base not in _catalogue():
        raise ValueError(f"{where}: base = {base!r} is not a catalogue name{nearest(base, _catalogue())}")
    table = dict(_catalogue()[base])
    deeper = _inherited(table.pop("base", None), where)
    table.pop("source", None)
    return deeper | table
