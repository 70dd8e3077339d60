"""The catalogue's kernel figures against published measurements of kernels, and the fits that gave them."""

from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from windtunnel.experiments.fit_kernels import (
    FITS,
    FLASH_BACKWARD,
    FLASH_FORWARD,
    MATMUL,
    PLAIN,
    STREAM,
    Measured,
    attention,
    fit,
    fit_attention,
    fit_matmul,
    left_out_errors,
    matmul,
    mean_error,
    measurements,
    price,
    roofline,
)
from windtunnel.sim.hardware import load_processor


@cache
def rows(gpu: str, *kinds: str) -> tuple[Measured, ...]:
    return tuple(row for row in measurements() if row.gpu == gpu and (not kinds or row.kind in kinds))


def test_every_row_of_a_gpu_of_the_catalogue_is_read() -> None:
    found = measurements()
    assert len(found) == 276 + 34
    assert {row.kind for row in found} == {MATMUL, STREAM, FLASH_FORWARD, FLASH_BACKWARD, PLAIN}
    assert all(row.seconds > 0 for row in found)


def test_a_row_by_hand() -> None:
    # hw-0005: 2 x 16384^3 FLOPs at 256.5 TFLOP/s. hw-0013: two arrays of 2^25 doubles at 1.75 TB/s.
    by_name = {row.what.split()[0]: row for row in rows("a100-80gb")}
    assert by_name["hw-0005"].seconds == pytest.approx(2 * 16384**3 / 256.5e12)
    assert by_name["hw-0013"].seconds == pytest.approx(2 * 8 * 2**25 / 1.75e12)
    # Plain attention: 4 x batch x heads x seq^2 x size FLOPs in its two products, scores in 16 bits four times.
    plain = by_name["hw-0014"]
    assert plain.seconds == pytest.approx(4 * 2 * 32 * 8192**2 * 64 / 46e12)
    scores = sum(k.read_bytes + k.write_bytes for k in plain.kernels) - 2 * 4 * 32 * 8192 * 64 * 2
    assert scores == 4 * 2 * 32 * 8192**2 * 2


def test_causal_attention_is_published_by_half_of_its_pairs() -> None:
    full, causal = (row for row in rows("a100-80gb", FLASH_FORWARD) if row.what.startswith("16x32x1024x1024x128"))
    assert full.seconds == pytest.approx(1.535e-3, rel=1e-3)
    assert causal.seconds == pytest.approx(0.956e-3, rel=1e-3)


@pytest.mark.parametrize(
    ("gpu", "kind", "most"),
    [
        ("a100-80gb", MATMUL, 0.065),
        ("a100-80gb", STREAM, 0.04),
        ("a100-80gb", FLASH_FORWARD, 0.035),
        ("a100-80gb", PLAIN, 0.1),
        ("h100-sxm", MATMUL, 0.10),
        ("h100-sxm", FLASH_FORWARD, 0.075),
        ("h100-sxm", PLAIN, 0.2),
        ("h100-pcie", MATMUL, 0.07),
        ("v100-16gb", MATMUL, 0.055),
        ("h200", STREAM, 0.06),
        ("b200", FLASH_FORWARD, 0.075),
        ("b200", FLASH_BACKWARD, 0.01),
    ],
)
def test_one_profile_prices_all_kernels_of_a_kind(gpu: str, kind: str, most: float) -> None:
    assert mean_error(rows(gpu, kind), load_processor(gpu)) <= most


@pytest.mark.parametrize(("gpu", "kind"), [("a100-80gb", MATMUL), ("a100-80gb", STREAM), ("h100-sxm", MATMUL)])
def test_shapes_are_priced_better_than_by_a_plain_roofline(gpu: str, kind: str) -> None:
    processor = load_processor(gpu)
    assert mean_error(rows(gpu, kind), processor) < 0.7 * mean_error(rows(gpu, kind), processor, roofline)


@pytest.mark.parametrize("gpu", ["a100-80gb", "h100-sxm", "h100-pcie", "v100-16gb", "b200", "h200"])
def test_the_catalogue_holds_what_is_fitted(gpu: str) -> None:
    mine, given_ = rows(gpu), load_processor(gpu)
    fitted = fit(mine, gpu)
    for kinds, _, names in FITS.values():
        if any(row.kind in kinds for row in mine):
            for name in names:
                told, found = getattr(given_, name), getattr(fitted, name)
                assert told == (found if found is None else pytest.approx(found, rel=0.01)), name


@pytest.mark.parametrize(
    ("gpu", "name", "sources", "most"),
    [
        ("a100-80gb", "matmul", 1, 0.065),
        ("h100-sxm", "matmul", 4, 0.165),
        ("v100-16gb", "matmul", 1, 0.095),
        ("a100-80gb", "stream", 3, 0.065),
        ("a100-80gb", "attention", 2, 0.045),
        ("h100-sxm", "attention", 3, 0.125),
    ],
)
def test_a_source_that_the_profile_was_not_fitted_to(gpu: str, name: str, sources: int, most: float) -> None:
    errors = left_out_errors(rows(gpu), gpu, name)
    assert len(errors) == sources
    assert max(errors.values()) <= most


@pytest.mark.parametrize(
    ("like", "gpu"), [("a100-80gb", "a100-40gb"), ("v100-16gb", "v100-32gb"), ("h100-sxm", "h200")]
)
def test_what_is_of_the_chip_does_not_depend_on_its_memory(like: str, gpu: str) -> None:
    names = ("matmul_efficiency", "matmul_efficiencies", "matmul_start_s", "cache_bytes", "cache_bytes_per_s")
    one, other = load_processor(like), load_processor(gpu)
    assert [getattr(one, name) for name in names] == [getattr(other, name) for name in names]


@settings(max_examples=5)
@given(share=st.floats(0.3, 0.95))
def test_a_fit_finds_the_share_that_made_the_times(share: float) -> None:
    processor = replace(load_processor("v100-16gb"), matmul_efficiency=share)
    made = [
        Measured(gpu="v100-16gb", kind=MATMUL, source="made", what=f"{n}", kernels=(kernel,), seconds=1.0)
        for n in (2048, 4096, 8192)
        for kernel in (matmul(1, n, n, n, "fp16"),)
    ]
    timed = [replace(row, seconds=price(row, processor)) for row in made]
    assert fit_matmul(timed, load_processor("v100-16gb")).matmul_efficiency == pytest.approx(share, abs=2e-3)


def test_attention_is_fitted_by_direction() -> None:
    a100 = load_processor("a100-80gb")
    told = replace(a100, attention_efficiency=0.4, attention_backward_efficiency=0.2, sources={
        **a100.sources, "attention_backward_efficiency": "made up",
    })  # fmt: skip
    made = []
    for kind in (FLASH_FORWARD, FLASH_BACKWARD):
        kernel = attention(kind, (4, 16, 4096, 4096, 128), "fp16", True)
        row = Measured(gpu="a100-80gb", kind=kind, source="made", what="", kernels=(kernel,), seconds=1.0)
        made.append(replace(row, seconds=price(row, told)))
    fitted = fit_attention(made, told)
    assert fitted.attention_efficiency == pytest.approx(0.4, abs=2e-3)
    assert fitted.attention_backward_efficiency == pytest.approx(0.2, abs=2e-3)
