"""The corpus: the same bytes on every call, and windows whose targets are the next bytes."""

import pytest
import torch
from windtunnel.experiments.corpus import batches, corpus_bytes


def test_corpus_is_source_code_cut_at_the_limit() -> None:
    text = corpus_bytes(300_000)
    assert len(text) == 300_000
    assert text == corpus_bytes(300_000)
    assert text.startswith(corpus_bytes(1_000))
    assert b"\ndef " in text
    assert b"import " in text


def test_corpus_refuses_a_limit_that_leaves_nothing() -> None:
    with pytest.raises(ValueError, match="limit_bytes = 0 must be >= 1"):
        corpus_bytes(0)


def test_batches_are_windows_and_their_next_bytes() -> None:
    data = bytes(range(256))
    pairs = batches(data, batch=3, seq=8, steps=5, seed=1)
    assert len(pairs) == 5
    for tokens, targets in pairs:
        assert tokens.shape == targets.shape == (3, 8)
        assert tokens.dtype == targets.dtype == torch.int64
        assert torch.equal(targets, tokens + 1)  # of 0, 1, 2, ... the next byte is one more


def test_batches_follow_the_seed() -> None:
    data = corpus_bytes(10_000)

    def drawn(seed: int) -> torch.Tensor:
        return torch.stack([torch.stack(pair) for pair in batches(data, batch=2, seq=16, steps=3, seed=seed)])

    assert torch.equal(drawn(7), drawn(7))
    assert not torch.equal(drawn(7), drawn(8))


def test_batches_use_the_text_to_its_end() -> None:
    tokens, targets = batches(b"ab", batch=1, seq=1, steps=1, seed=0)[0]
    assert (tokens.item(), targets.item()) == (ord("a"), ord("b"))
    with pytest.raises(ValueError, match="seq = 2 needs at least 3 bytes of text, got 2"):
        batches(b"ab", batch=1, seq=2, steps=1, seed=0)


@pytest.mark.parametrize("field", ["batch", "seq", "steps"])
def test_batches_refuse_a_size_below_one(field: str) -> None:
    sizes = {"batch": 1, "seq": 1, "steps": 1} | {field: 0}
    with pytest.raises(ValueError, match=f"{field} = 0 must be >= 1"):
        batches(b"abc", **sizes, seed=0)
