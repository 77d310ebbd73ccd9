"""Intervals calibrated on other patients."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from histrata.expression.conformal import NEW, half_widths, residuals


def test_residuals_are_distances_in_units_of_the_deviation():
    truth, mean = np.array([[1.0, 2.0], [3.0, np.nan]]), np.array([[2.0, 2.0], [1.0, 0.0]])
    np.testing.assert_allclose(residuals(truth, mean), [[1, 0], [2, np.nan]])
    np.testing.assert_allclose(residuals(truth, mean, np.array([[0.5, 1], [4, 1]])), [[2, 0], [0.5, np.nan]])


def test_with_patients_of_one_size_it_is_the_conformal_quantile_of_all_other_residuals():
    rng = np.random.default_rng(0)
    of_patients = {f"p{i}": rng.exponential(i + 1, 37) for i in range(5)}
    found = half_widths(of_patients, alpha=0.2)
    for name in (*of_patients, NEW):
        values = np.sort(np.concatenate([v for other, v in of_patients.items() if other != name]))
        # The k-th smallest of n, with k = ceil((1 - alpha) (n + 1)).
        k = int(np.ceil(0.8 * (len(values) + 1)))
        assert found[name] == values[k - 1]


def test_a_patient_with_more_spots_counts_no_more():
    few, many = np.linspace(0, 1, 101), np.linspace(10, 11, 100_000)
    found = half_widths({"few": few, "many": many, "other": few}, alpha=0.5)
    # Two patients of three lie below 1, however many spots the third has.
    assert found[NEW] < 1
    assert half_widths({"many": many, "few": few, "more": many}, alpha=0.5)[NEW] > 10


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.floats(0, 100), min_size=1, max_size=30), min_size=3, max_size=6),
    st.lists(st.floats(0, 1e6), max_size=40),
    st.floats(0.05, 0.5),
)
def test_the_interval_of_a_patient_does_not_depend_on_its_own_residuals(others, own, alpha):
    of_patients = {f"p{i}": np.array(values) for i, values in enumerate(others)}
    found = half_widths(of_patients | {"own": np.array(own)}, alpha)
    assert found["own"] == half_widths(of_patients, alpha)[NEW]
    assert found["own"] >= 0


def test_intervals_of_new_patients_hold_the_share_of_spots_that_they_should():
    rng = np.random.default_rng(1)
    # Patients differ in how well they are predicted, and in size.
    patients = {f"p{i}": rng.normal(0, rng.uniform(0.5, 2), rng.integers(50, 400)) for i in range(200)}
    found = half_widths({name: np.abs(values) for name, values in patients.items()})
    covered = [np.mean(np.abs(values) <= found[name]) for name, values in patients.items()]
    assert np.mean(covered) == pytest.approx(0.9, abs=0.02)


def test_fewer_than_two_patients_calibrate_nothing():
    ones = np.ones(100)
    assert np.isnan(list(half_widths({"a": ones}).values())).all()
    assert np.isnan(half_widths({})[NEW])
    two = half_widths({"a": ones, "b": ones, "none": np.zeros(0)})
    assert np.isnan([two["a"], two["b"]]).all()
    assert two[NEW] == two["none"] == 1


def test_too_few_spots_give_an_interval_without_end():
    assert half_widths({"a": np.ones(2), "b": np.ones(2)})[NEW] == np.inf
