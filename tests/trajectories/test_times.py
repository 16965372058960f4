"""Columns as times: which order is taken, and what is refused."""

import numpy as np
import pandas as pd
import pytest

from genemodel.errors import ConfigError, DataError
from genemodel.trajectories.times import times_of


def obs(values, n=12):
    return pd.DataFrame({"stage": pd.Series(np.repeat(np.array(values, dtype=object), n))})


@pytest.mark.parametrize(
    ("values", "names", "numbers"),
    [
        (["500_minutes", "300_minutes", "400_minutes"],
         ["300_minutes", "400_minutes", "500_minutes"], [300, 400, 500]),
        (["E9", "E15.5", "E10.5"], ["E9", "E10.5", "E15.5"], [9, 10.5, 15.5]),
        (["day-3", "day-0", "day-12"], ["day-0", "day-3", "day-12"], [0, 3, 12]),
        ([0.0, -2.0, 3.5], ["-2", "0", "3.5"], [-2, 0, 3.5]),
        (["16-cell", "2-cell", "8-cell"], ["2-cell", "8-cell", "16-cell"], [2, 8, 16]),
    ],
)  # fmt: skip
def test_numbers_make_the_order(values, names, numbers):
    times = times_of(obs(values), "stage")
    assert times.names == names and times.measured
    np.testing.assert_array_equal(times.value_T, numbers)
    assert [names[code] for code in times.code_C[::12]] == [
        str(int(v)) if isinstance(v, float) and v.is_integer() else str(v) for v in values
    ]


def test_an_order_that_is_given_leaves_others_unknown():
    table = obs(["early", "middle", "late", "other"])
    times = times_of(table, "stage", ["early", "middle", "late"])
    np.testing.assert_array_equal(times.value_T, [0, 1, 2])
    assert not times.measured and (times.code_C[36:] == -1).all()
    assert np.isnan(times.value_C[36:]).all() and list(times.inner) == [1]


def test_ordered_categories_are_an_order():
    table = obs(["late", "early", "middle"])
    table["stage"] = pd.Categorical(table["stage"], ["early", "middle", "late"], ordered=True)
    assert times_of(table, "stage").names == ["early", "middle", "late"]


def test_an_order_against_the_numbers_makes_names_of_them():
    times = times_of(obs(["P0", "E15", "P7"]), "stage", ["E15", "P0", "P7"])
    assert not times.measured
    np.testing.assert_array_equal(times.value_T, [0, 1, 2])


@pytest.mark.parametrize(
    ("values", "order", "error", "said"),
    [
        (["a", "b", "c"], [], DataError, "no order"),
        (["1", "2"], [], DataError, "holds 2 times"),
        (["1", "2", "3"], ["1", "2", "3", "1"], ConfigError, "twice"),
        (["1", "2", "3"], ["1", "2", "30"], DataError, "'30'"),
        (["E8-E9", "E10", "E11"], [], DataError, "E8-E9"),
    ],
)
def test_refusals(values, order, error, said):
    with pytest.raises(error, match=said):
        times_of(obs(values), "stage", order)


def test_a_time_of_few_cells_is_named():
    table = pd.concat([obs([1, 2, 3]), obs([4], 3)], ignore_index=True)
    with pytest.raises(DataError, match=r"4 \(3\)"):
        times_of(table, "stage")
    with pytest.raises(DataError, match="no column"):
        times_of(table, "stages")
