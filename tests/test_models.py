"""Models as numbers: published parameter counts, published flop formulas, and errors that a person can act on."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from windtunnel.experiments.models import ModelSpec, load_model, model_names

TOML = """
layers = 2
hidden = 64
heads = 4
vocab = 100
seq = 16
mlp = "gelu"
norm = "layernorm"
positions = "learned"
attention = "causal"
tied = true
bias = true
"""

# Safetensors metadata or config-derived counts of the released checkpoints.
EXACT = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "mixtral-8x7b": 46_702_792_704,
}

# Billions as the tables print them: Narayanan et al. 2021 Table 1, Shoeybi et al. 2019 Table 1, Megatron-LM's README of
# September 2020, Brown et al. 2020 Table 2.1 (and 174.6 in Narayanan et al. 2021 Table 2), Korthikanti et al. 2022.
ROUNDED = {
    "megatron-1.7b": "1.7",
    "megatron-3.6b": "3.6",
    "megatron-7.5b": "7.5",
    "megatron-18.4b": "18.4",
    "megatron-39.1b": "39.1",
    "megatron-76.1b": "76.1",
    "megatron-145.6b": "145.6",
    "megatron-310.1b": "310.1",
    "megatron-529.6b": "529.6",
    "megatron-1008b": "1008.0",
    "megatron-2019-1.2b": "1.2",
    "megatron-2019-2.5b": "2.5",
    "megatron-2019-4.2b": "4.2",
    "megatron-2019-8.3b": "8.3",
    "megatron-2020-1b": "1.16",
    "megatron-2020-2b": "2.03",
    "megatron-2020-4b": "4.24",
    "megatron-2020-8b": "8.67",
    "megatron-22b": "22",
    "megatron-175b": "175",
    "megatron-530b": "530",
    "gpt3-125m": "0.125",
    "gpt3-760m": "0.760",
    "gpt3-1.3b": "1.3",
    "gpt3-2.7b": "2.7",
    "gpt3-6.7b": "6.7",
    "gpt3-13b": "13",
    "gpt3-175b": "174.6",
    "mt-nlg-530b": "530",
    "gpt-1t": "1008.0",
}

# Published counts that round more coarsely or count what we leave out, with the relative tolerance that this takes.
NEAR = {
    "gpt3-350m": (350e6, 0.02),
    "bloom-176b": (176_247_271_424, 0.001),
    "bert-large": (340e6, 0.02),
    "megatron-1t": (1000e9, 0.01),
}


@pytest.mark.parametrize("name", EXACT)
def test_parameters_equal_the_released_checkpoints(name: str) -> None:
    assert load_model(name).parameters == EXACT[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_parameters_round_to_the_published_ones(name: str) -> None:
    decimals = len(ROUNDED[name].partition(".")[2])
    assert f"{load_model(name).parameters / 1e9:.{decimals}f}" == ROUNDED[name]


@pytest.mark.parametrize("name", NEAR)
def test_parameters_are_near_the_published_ones(name: str) -> None:
    published, tolerance = NEAR[name]
    assert load_model(name).parameters == pytest.approx(published, rel=tolerance)


def test_every_catalogue_model_is_held_against_a_published_count_and_names_its_source() -> None:
    assert set(model_names()) == set(EXACT) | set(ROUNDED) | set(NEAR) | {"gpt-demo"}
    assert all(len(load_model(name).source) > 20 for name in model_names())


def test_bloom_lacks_only_the_norm_after_its_embedding() -> None:
    bloom = load_model("bloom-176b")
    assert bloom.parameters + 2 * bloom.hidden == 176_247_271_424


@pytest.mark.parametrize("name", ["gpt3-175b", "megatron-1.7b", "megatron-2019-8.3b"])
def test_forward_flops_agree_with_the_formula_of_megatron(name: str) -> None:
    """96 B s l h^2 (1 + s / 6h + V / 16lh) is 4 forward passes of the blocks (one recomputed) and 3 of the logits."""
    spec, B, s = load_model(name), 3, load_model(name).seq
    logits = 2 * B * s * spec.hidden * spec.vocab
    blocks = spec.forward_flops(B, s) - logits
    h, layers = spec.hidden, spec.layers
    published = 96 * B * s * layers * h**2 * (1 + s / (6 * h) + spec.vocab / (16 * layers * h))
    assert 4 * blocks + 3 * logits == pytest.approx(published, rel=1e-12)


def test_forward_flops_grow_with_the_square_of_the_sequence_in_attention_only() -> None:
    spec = load_model("llama3-8b")
    attention = spec.forward_flops(1, 4096) - 4096 * spec.matmul_flops_per_token
    assert spec.forward_flops(1, 8192) - 8192 * spec.matmul_flops_per_token == 4 * attention


def test_a_file_describes_a_model(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(TOML)
    spec = load_model(str(path))
    assert (spec.name, spec.kv_heads, spec.ffn, spec.head_size) == ("mine", 4, 256, 16)
    assert spec.source == f"model file {path}"
    assert load_model(path) == spec


def test_a_file_may_start_from_a_catalogue_model(tmp_path: Path) -> None:
    path = tmp_path / "short.toml"
    path.write_text('base = "llama3-70b"\nlayers = 4\n')
    assert load_model(path) == replace(load_model("llama3-70b"), layers=4, name="short", source=f"model file {path}")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("hidden = 64", "hiden = 64", "did you mean 'hidden'?"),
        ("hidden = 64", "", "missing hidden"),
        ("hidden = 64", "hidden = '64'", "hidden = '64' must be a whole number"),
        ("hidden = 64", "hidden = 64.0", "hidden = 64.0 must be a whole number"),
        ("layers = 2", "layers = true", "layers = True must be a whole number"),
        ("layers = 2", "layers = 0", "layers = 0 must be >= 1"),
        ("layers = 2", "layers = -2", "layers = -2 must be >= 1"),
        ("heads = 4", "heads = 5", "hidden = 64 must be a multiple of heads = 5"),
        ("heads = 4", "heads = 4\nkv_heads = 3", "kv_heads = 3 must divide heads = 4"),
        ("heads = 4", "heads = 4\nkv_heads = 0", "kv_heads = 0 must be >= 1"),
        ("heads = 4", "heads = 4\nffn = 'wide'", "ffn = 'wide' must be a whole number"),
        ('"gelu"', '"geglu"', "mlp = 'geglu' must be one of 'gelu', 'swiglu'"),
        ('"learned"', "7", "positions = 7 must be one of 'learned', 'rope', 'alibi', 'none'"),
        ('"learned"', '["rope"]', "positions = ['rope'] must be one of"),
        ("tied = true", "tied = 'true'", "tied = 'true' must be true or false"),
        ("bias = true", "bias = 1", "bias = 1 must be true or false"),
        ("tied = true", "tied = true\nexperts = 8", "experts = 8 needs top_k beside it"),
        ("tied = true", "tied = true\nexperts = 2\ntop_k = 4", "top_k = 4 must be <= experts = 2"),
        ("tied = true", "tied = true\nbalance = -1", "balance = -1 must be a number >= 0"),
        ("tied = true", "tied = true\ncapacity_factor = 0", "capacity_factor = 0 must be a number > 0"),
        ("tied = true", "tied = true\nbase = 'gtp2'", "base = 'gtp2' is not a catalogue name; did you mean 'gpt2'?"),
        ("tied = true", "tied = true\nname = 3", "name = 3 must be text"),
        ("tied = true", "tied = ", "not TOML"),
    ],
)
def test_a_bad_file_says_in_one_line_what_to_change(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    assert old in TOML
    path.write_text(TOML.replace(old, new, 1))
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below, brackets and all
        load_model(path)
    assert message in str(caught.value)
    assert "bad" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt3-157b", r"model = 'gpt3-157b' is neither .*; did you mean 'gpt3-175b'\?"),
        ("nowhere.toml", "cannot read 'nowhere.toml': .*No such file"),
        ("", "model = '' is neither"),
    ],
)
def test_an_unknown_model_names_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(name)


def test_rope_needs_an_even_head() -> None:
    with pytest.raises(ValueError, match="positions = 'rope' turns pairs"):
        replace(load_model("gpt-demo"), hidden=24, positions="rope")


def test_experts_are_counted_as_published() -> None:
    """Mixtral 8x7B: the checkpoint's elements; of these, "13B active parameters" (Jiang et al. 2024, abstract)."""
    base: ModelSpec = load_model("llama3-8b")
    mixtral = replace(base, vocab=32_000, seq=32_768, experts=8, top_k=2)
    assert mixtral.parameters == 46_702_792_704
    assert mixtral.matmul_flops_per_token / 2 == pytest.approx(12.9e9, rel=0.02)


def test_the_catalogue_answers_without_torch_or_pydantic() -> None:
    code = (
        "import sys; from windtunnel.experiments.models import load_model; load_model('gpt2').parameters;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'pydantic')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
