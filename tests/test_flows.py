"""Max-min fair rates: their definition, and the same sum done slowly in fractions."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from windtunnel.sim.flows import max_min_rates

ROUNDING = 1e-9
"""A rate is a difference of some ten figures that are each rounded to 1e-16, over a count of flows."""


def rates_in_fractions(capacities: Sequence[float], routes: Sequence[Sequence[int]]) -> list[Fraction]:
    """Water filling: all rates rise together, and stop one link after the other."""
    rates = [Fraction(0)] * len(routes)
    rising = set(range(len(routes)))
    while rising:
        rises = {}
        for link, capacity in enumerate(capacities):
            through = [number for number in rising for each in routes[number] if each == link]
            used = sum((rates[number] * list(route).count(link) for number, route in enumerate(routes)), Fraction(0))
            if through:
                rises[link] = (Fraction(capacity) - used) / len(through)
        least = min(rises.values())
        for number in rising:
            rates[number] += least
        full = {link for link, rise in rises.items() if rise == least}
        rising = {number for number in rising if not full & set(routes[number])}
    return rates


@st.composite
def networks(draw: st.DrawFn) -> tuple[list[float], list[list[int]]]:
    """Capacities of links, and for each flow the different links that it takes."""
    capacities = draw(st.lists(st.sampled_from([1.0, 2.0, 3.0, 10.0]) | st.floats(0.01, 100), min_size=1, max_size=6))
    links = st.lists(st.integers(0, len(capacities) - 1), min_size=1, max_size=4, unique=True)
    return capacities, draw(st.lists(links, min_size=1, max_size=12))


def padded(capacities: list[float], routes: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    width = max(map(len, routes))
    rows = [[*route, *[len(capacities)] * (width - len(route))] for route in routes]
    return np.array([*capacities, np.inf]), np.array(rows)


@given(networks())
def test_every_flow_has_a_bottleneck_and_no_link_carries_too_much(network: tuple[list[float], list[list[int]]]) -> None:
    capacities, routes = network
    rates = max_min_rates(*padded(capacities, routes))
    load = [sum(rate for rate, route in zip(rates, routes, strict=True) if link in route) for link in range(6)]
    assert all(used <= capacity * (1 + ROUNDING) for used, capacity in zip(load, capacities, strict=False))
    for rate, route in zip(rates, routes, strict=True):
        assert any(
            load[link] >= capacities[link] * (1 - ROUNDING)
            and rate >= max(r for r, other in zip(rates, routes, strict=True) if link in other) * (1 - ROUNDING)
            for link in route
        )


@given(networks())
def test_rates_are_those_of_water_filling_in_fractions(network: tuple[list[float], list[list[int]]]) -> None:
    rates = max_min_rates(*padded(*network))
    assert rates == pytest.approx([float(rate) for rate in rates_in_fractions(*network)], rel=ROUNDING)


def test_the_textbook_example() -> None:
    # Bertsekas and Gallager, figure 6.15, in spirit: two flows share a link with a long one that is slower elsewhere.
    capacities, routes = padded([1.0, 1.0, 10.0], [[0], [0, 1], [0], [1, 2], [2]])
    assert max_min_rates(capacities, routes) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 2 / 3, 28 / 3])


def test_a_flow_through_no_link_that_fills_is_not_held_back() -> None:
    assert max_min_rates(np.array([4.0, np.inf]), np.array([[0, 1], [1, 1]])).tolist() == [4.0, np.inf]
    assert max_min_rates(np.array([4.0]), np.empty((0, 1), int)).size == 0


def test_many_alike_are_alike() -> None:
    ranks = np.arange(16_384)
    rates = max_min_rates(np.full(2 * 16_384, 25e9), np.stack([2 * ranks, 2 * np.roll(ranks, -1) + 1], axis=1))
    assert set(rates) == {25e9}
