"""docs/config.md is what the code says, and each key of the config has its line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from windtunnel.engine.config import Config
from windtunnel.engine.dialect import ALWAYS, AUTO, REFUSED, RENAMED
from windtunnel.experiments import what_if
from windtunnel.experiments.config_keys import attribute_lines, filled, generated, keys, price_of
from windtunnel.experiments.what_if import BASE, KEYS_WITHOUT_PRICE, RESULTS, VARIANTS, Variant

DOCUMENT = Path(__file__).parent.parent / "docs" / "config.md"
WRITE_AGAIN = "run: python -m windtunnel.experiments.config_keys docs/config.md"


def test_every_key_has_a_line() -> None:
    for key in keys():
        assert key.meaning, f"{key.path}: give it a line under 'Attributes:' in the docstring of its dataclass"
        assert "\n" not in key.meaning
        assert "|" not in key.meaning
        assert price_of(key.path) is not None, (
            f"{key.path}: give it a Variant in experiments/what_if.py (and make its CSV again), or, if no simulation"
            " can show its price, a line in KEYS_WITHOUT_PRICE there"
        )


def test_the_document_lists_exactly_the_keys() -> None:
    listed = [line.split("`")[1] for line in section("keys").splitlines()[2:]]
    assert listed == [key.path for key in keys()], WRITE_AGAIN


@pytest.mark.parametrize("name", ["keys", "what if", "always", "auto", "refused"])
def test_the_document_is_what_the_code_says(name: str) -> None:
    assert section(name) == generated()[name], WRITE_AGAIN


def section(name: str) -> str:
    return DOCUMENT.read_text().partition(f"<!-- {name} -->\n")[2].partition("\n<!-- end -->")[0]


def test_a_key_is_listed_in_one_table() -> None:
    """One that is honoured by now must leave the tables of engine/dialect.py, which are read before it."""
    honoured = {key.path for key in keys()} | {key.path.partition(".")[0] for key in keys()}
    honoured -= {"zero_optimization", "fp16"}
    for path in (*ALWAYS, *REFUSED, *RENAMED):
        assert path not in honoured, f"{path} is honoured: take it out of engine/dialect.py"
    assert not set(ALWAYS) & set(REFUSED)
    assert {path.partition(".params")[0] for path in AUTO} <= honoured | {"optimizer"}


def test_prices_are_of_keys_that_there_are() -> None:
    paths = [key.path for key in keys()]
    for known in (*KEYS_WITHOUT_PRICE, *(path for variant in VARIANTS for path in variant.paths)):
        assert any(path == known or path.startswith(f"{known}.") for path in paths), known
    assert [row["variant"] for row in what_if.read(RESULTS)] == ["", *(variant.label for variant in VARIANTS)], (
        "run: windtunnel reproduce what_if --out experiments/bench/results"
    )


@pytest.mark.parametrize("variant", [Variant(), *VARIANTS], ids=lambda variant: variant.label or "base")
def test_every_variant_is_a_config(variant: Variant) -> None:
    config = Config.read(variant.config(), what_if.GPUS)
    if variant.change:
        assert config != Config.read(BASE, what_if.GPUS)


def test_filling_changes_what_is_between_the_marks_alone() -> None:
    document = "before\n" + "".join(f"<!-- {name} -->\nstale text\n<!-- end -->\nkept {name}\n" for name in generated())
    again = filled(document)
    assert "stale text" not in again
    assert again.startswith("before\n")
    assert all(f"kept {name}\n" in again for name in generated())
    assert filled(again) == again
    with pytest.raises(ValueError, match="the document has no place for 'keys'"):
        filled("nothing")


@dataclass(frozen=True)
class Documented:
    """What it is.

    Attributes:
        one: a line
            that goes on.
        two, three: shared.

    Raises:
        four: not an attribute.
    """

    one: int = 0


def test_lines_of_attributes() -> None:
    assert attribute_lines(Documented) == {"one": "a line that goes on.", "two": "shared.", "three": "shared."}


def test_a_variant_is_laid_over_the_base() -> None:
    change: dict[str, Any] = {"zero_optimization": {"zero_quantized_weights": True}, "optimizer": {"type": "SGD"}}
    variant = Variant(change)
    assert variant.config() == {
        **BASE,
        "zero_optimization": {"stage": 3, "zero_quantized_weights": True},
        "optimizer": {"type": "SGD"},
    }
    assert variant.label == "zero_optimization.zero_quantized_weights = true, optimizer.type = SGD"
    assert BASE["zero_optimization"] == {"stage": 3}


def test_a_row_is_relative_to_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job small enough to fly here: stage 0 keeps what 4 GPUs would share, and sends two thirds of stage 3."""
    monkeypatch.setattr(what_if, "MODEL", "gpt-demo")
    monkeypatch.setattr(what_if, "GPUS", 4)
    monkeypatch.setattr(what_if, "BASE", {**BASE, "train_batch_size": 8})
    base, row = what_if.rows([Variant({"zero_optimization": {"stage": 0}})])
    assert (base["variant"], base["relative_s_per_sequence"]) == ("", 0.0)
    assert row["relative_peak_memory_bytes"] > 0
    assert row["relative_bytes_sent_per_gpu"] == pytest.approx(-1 / 3, abs=0.02)  # paddings and scalars differ
    assert row["relative_bytes_sent_per_gpu"] == row["bytes_sent_per_gpu"] / base["bytes_sent_per_gpu"] - 1
    assert what_if.cells(base)[:2] == ("base", "as above")
    assert what_if.cells(row)[:2] == ("1", "zero_optimization.stage = 0")
