"""Failures: published counts, the best interval, and the closed form held against a simulated month."""

import math
from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from windtunnel.sim.failures import (
    MONTH_S,
    Saving,
    best_saving,
    daly_interval_s,
    failure_names,
    load_failures,
    play,
    young_interval_s,
)

MINUTE, HOUR, DAY = 60.0, 3_600.0, 86_400.0

mtbfs = st.floats(10 * MINUTE, 1000 * HOUR)
checkpoints = st.floats(0.1, 10 * MINUTE)
restarts = st.floats(0, HOUR)


@pytest.mark.parametrize("name", failure_names())
def test_every_profile_has_a_source_for_each_figure(name: str) -> None:
    profile = load_failures(name)
    assert profile.name == name
    assert all(len(source) >= 20 for source in profile.sources.values())
    assert all(len(each.source) >= 20 for each in profile.components)
    assert all(hours > 0 for hours in profile.mtbf_hours().values())
    hash(profile)


def test_the_job_that_was_counted_has_its_own_rate() -> None:
    # 419 interruptions in 54 days of 16,384 GPUs: one every three hours (Grattafiori et al. 2024, section 3.3.4).
    llama = load_failures("llama3")
    assert 54 * DAY / llama.mean_time_between_s(16_384, 8, 8) == pytest.approx(419)
    assert llama.mean_time_between_s(16_384, 8, 8) == pytest.approx(3.09 * HOUR, rel=0.01)


def test_llama_3_spent_more_than_nine_tenths_of_its_time_on_training() -> None:
    # "Higher than 90 % effective training time" (Grattafiori et al. 2024, section 3.3.4). A checkpoint of 405 B
    # parameters in mixed precision has 14 bytes of each.
    llama = load_failures("llama3")
    checkpoint_s = 14 * 405e9 / (llama.storage_bytes_per_s_per_node * 2048)
    mtbf_s = llama.mean_time_between_s(16_384, 8, 8)
    saving = best_saving(mtbf_s=mtbf_s, checkpoint_s=checkpoint_s, restart_s=llama.restart_s)
    assert 0.90 < saving.share < 0.95
    assert play(saving, seconds=54 * DAY).share == pytest.approx(saving.share, abs=0.02)


@pytest.mark.parametrize(("gpus", "hours"), [(16_384, 1.8), (131_072, 0.23)])
def test_what_the_counters_of_rsc_1_project(gpus: int, hours: float) -> None:
    # Kokolis et al. 2024 project these from 6.50 failures per 1,000 node-days.
    assert load_failures("rsc-1").mean_time_between_s(gpus, 8, 8) == pytest.approx(hours * HOUR, rel=0.03)


@given(st.sampled_from(failure_names()), st.integers(1, 4096))
def test_a_larger_job_is_interrupted_more_often(name: str, nodes: int) -> None:
    profile = load_failures(name)
    one = profile.mean_time_between_s(8, 8, 8)
    assert profile.mean_time_between_s(8 * nodes, 8, 8) == pytest.approx(one / nodes)
    assert profile.mean_time_between_s(8, 8, 0) >= one  # without a network fewer parts can fail


@pytest.mark.parametrize(
    ("mtbf_s", "minutes", "digits"), [(24 * HOUR, 117, 0), (6 * HOUR, 57, 0), (15 * MINUTE, 9.1, 1)]
)
def test_the_intervals_that_daly_prints(mtbf_s: float, minutes: float, digits: int) -> None:
    # Daly 2006, figures 3 to 5: a checkpoint takes 5 minutes.
    assert round(daly_interval_s(5 * MINUTE, mtbf_s) / MINUTE, digits) == minutes


@given(mtbf_s=mtbfs, checkpoint_s=checkpoints)
def test_daly_agrees_with_young_where_failures_are_rare(mtbf_s: float, checkpoint_s: float) -> None:
    young, daly = young_interval_s(checkpoint_s, mtbf_s), daly_interval_s(checkpoint_s, mtbf_s)
    assert 0 < daly <= mtbf_s or daly <= young
    # They differ by the second order: sqrt(d / 2 M) / 3 and the checkpoint itself.
    if checkpoint_s < mtbf_s / 50:
        assert abs(daly - young) <= checkpoint_s


@given(mtbf_s=mtbfs, checkpoint_s=checkpoints, restart_s=restarts, factor=st.floats(0.05, 20))
def test_no_other_interval_is_better(mtbf_s: float, checkpoint_s: float, restart_s: float, factor: float) -> None:
    best = best_saving(mtbf_s=mtbf_s, checkpoint_s=checkpoint_s, restart_s=restart_s)
    other = Saving(mtbf_s=mtbf_s, interval_s=factor * best.interval_s, checkpoint_s=checkpoint_s, restart_s=restart_s)
    # The interval is a series cut off; what that costs in progress is below 0.2 % of it up to d = 2 M.
    assert other.share <= best.share * 1.002
    if not 0.7 < factor < 1.4 and checkpoint_s < mtbf_s:
        assert other.share < best.share


@given(mtbf_s=mtbfs, checkpoint_s=checkpoints, restart_s=restarts, more=st.floats(1.01, 10))
def test_goodput_falls_with_failures_checkpoints_and_restarts(
    mtbf_s: float, checkpoint_s: float, restart_s: float, more: float
) -> None:
    share = best_saving(mtbf_s=mtbf_s, checkpoint_s=checkpoint_s, restart_s=restart_s).share
    assert 0 < share < 1
    assert best_saving(mtbf_s=mtbf_s / more, checkpoint_s=checkpoint_s, restart_s=restart_s).share < share
    assert best_saving(mtbf_s=mtbf_s, checkpoint_s=checkpoint_s * more, restart_s=restart_s).share < share
    assert best_saving(mtbf_s=mtbf_s, checkpoint_s=checkpoint_s, restart_s=restart_s + more).share < share


def test_without_failures_only_checkpoints_cost() -> None:
    saving = Saving(mtbf_s=1e12, interval_s=900.0, checkpoint_s=100.0, restart_s=600.0)
    assert saving.share == pytest.approx(0.9)
    month = play(saving)
    assert (month.interruptions, month.lost_s, month.restart_s) == (0, 0, 0)
    assert month.share == pytest.approx(0.9)


def test_a_job_that_never_gets_anywhere() -> None:
    hopeless = Saving(mtbf_s=1.0, interval_s=HOUR, checkpoint_s=MINUTE, restart_s=MINUTE)
    assert hopeless.share == 0
    assert play(hopeless, seconds=HOUR).work_s == 0


@pytest.mark.parametrize(
    ("mtbf_s", "checkpoint_s", "restart_s"),
    [(3 * HOUR, 30.0, 10 * MINUTE), (24 * HOUR, 5 * MINUTE, 10 * MINUTE), (HOUR, 2 * MINUTE, 5 * MINUTE)],
)
def test_the_closed_form_is_the_mean_of_simulated_months(mtbf_s: float, checkpoint_s: float, restart_s: float) -> None:
    for factor in (0.5, 1.0, 2.0):
        best = daly_interval_s(checkpoint_s, mtbf_s)
        saving = Saving(mtbf_s=mtbf_s, interval_s=factor * best, checkpoint_s=checkpoint_s, restart_s=restart_s)
        # Over so many failures the mean of the lost time is known to about 1 / sqrt(their number), and the lost time
        # is at most a third of the whole: three standard errors.
        seconds = 20_000 * mtbf_s
        played = play(saving, seconds=seconds, seed=1)
        assert played.interruptions == pytest.approx(20_000, rel=0.03)
        assert played.share == pytest.approx(saving.share, rel=0.01)


def test_the_best_interval_is_the_best_of_simulated_ones() -> None:
    mtbf_s, checkpoint_s, restart_s = 3 * HOUR, 2 * MINUTE, 10 * MINUTE
    best = daly_interval_s(checkpoint_s, mtbf_s)

    def share(interval_s: float) -> float:
        saving = Saving(mtbf_s=mtbf_s, interval_s=interval_s, checkpoint_s=checkpoint_s, restart_s=restart_s)
        return fmean(play(saving, seconds=10 * MONTH_S, seed=seed).share for seed in range(8))  # the same failures

    shares = {factor: share(factor * best) for factor in (0.3, 0.6, 1.0, 1.7, 3.0)}
    assert max(shares, key=lambda factor: shares[factor]) == 1.0


@given(mtbf_s=mtbfs, checkpoint_s=checkpoints, restart_s=restarts, seed=st.integers(0, 1000))
def test_every_second_of_a_month_is_accounted_for(
    mtbf_s: float, checkpoint_s: float, restart_s: float, seed: int
) -> None:
    saving = best_saving(mtbf_s=mtbf_s, checkpoint_s=checkpoint_s, restart_s=restart_s)
    month = play(saving, seed=seed)
    parts = (month.work_s, month.checkpoint_s, month.restart_s, month.lost_s)
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(MONTH_S)
    assert month == play(saving, seed=seed)


PROFILE = """
restart_s = 60
storage_bytes_per_s_per_node = 1e9
observed = { days = 10, gpus = 16, gpus_per_node = 8, nics_per_node = 4 }
components = [
  { name = "GPU", per = "gpu", interruptions = 4, source = "counted" },
  { name = "port", per = "nic", interruptions = 2.0, source = "counted too" },
]
[sources]
observed = "counted"
restart_s = "measured"
storage_bytes_per_s_per_node = "measured"
"""


def test_rates_of_a_user_s_profile_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(PROFILE)
    mine = load_failures(str(path))
    assert mine.mtbf_hours() == {"GPU": 16 * 240 / 4, "port": 8 * 240 / 2}
    # 8 GPUs: one failure of a GPU in 120 h; with 4 NICs one of a port in 240 h as well.
    assert mine.mean_time_between_s(8, 8, 0) == pytest.approx(120 * HOUR)
    assert mine.mean_time_between_s(8, 8, 4) == pytest.approx(80 * HOUR)
    assert math.isinf(load_failures(write_without_gpus(path)).mean_time_between_s(8, 8, 0))


def write_without_gpus(path: Path) -> str:
    path.write_text(PROFILE.replace('per = "gpu"', 'per = "nic"'))
    return str(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('per = "gpu"', 'per = "rack"', r"components\.0\.per = 'rack'"),
        ("interruptions = 4", "interruptions = 0", r"interruptions must be > 0"),
        ("restart_s = 60", "restart_s = -1", r"restart_s must be >= 0"),
        ('restart_s = "measured"\n', "", r"'restart_s' has no source"),
        ('source = "counted too"', 'source = " "', r"component 'port' has no source"),
        ("days = 10", "days = 10, weeks = 1", r"unknown key 'observed\.weeks'"),
    ],
)
def test_a_bad_profile_gives_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(PROFILE.replace(old, new))
    with pytest.raises(ValueError, match=message) as error:
        load_failures(path)
    assert "\n" not in str(error.value)


def test_an_unknown_profile_and_bad_times() -> None:
    with pytest.raises(ValueError, match=r"unknown failure profile 'lama3'.*did you mean 'llama3'"):
        load_failures("lama3")
    with pytest.raises(ValueError, match=r"checkpoint_s must be > 0 and finite, got 0"):
        best_saving(mtbf_s=1.0, checkpoint_s=0, restart_s=0)
    with pytest.raises(ValueError, match=r"mtbf_s must be > 0 and finite, got inf"):
        best_saving(mtbf_s=math.inf, checkpoint_s=1, restart_s=0)
