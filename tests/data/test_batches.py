import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fbi.data import Batches
from fbi.data.loader import merge_ranges
from fbi.errors import InputError


def some(batches, count, start=0):
    return [batches.batch_at(step) for step in range(start, start + count)]


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_together_read_the_same_global_batch(windows, hosts):
    whole = Batches(windows, batch=8, seed=3)
    shares = np.split(np.arange(8), hosts)
    parts = [Batches(windows, batch=8, seed=3, rows=share.tolist()) for share in shares]
    for step in (0, 1, 1000):
        together = np.concatenate([part.batch_at(step) for part in parts])
        np.testing.assert_array_equal(together, whole.batch_at(step))
        assert together.shape == (8, windows.window + 1)
        assert together.dtype == np.int32


def test_every_epoch_is_a_fresh_permutation_of_all_windows(windows):
    count = windows.count("train")
    batches = Batches(windows, batch=1, seed=0)
    epochs = [[batches.indices_at(e * count + i)[0] for i in range(count)] for e in range(4)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert all(a != b for a, b in itertools.combinations([*epochs, list(range(count))], 2))
    np.testing.assert_array_equal(batches.batch_at(count + 1)[0], windows.read("train", epochs[1][1]))


def test_epochs_meet_within_a_batch(windows):
    count = windows.count("validation")
    one, many = (Batches(windows, "validation", batch=batch, seed=0) for batch in (1, 2 * count + 1))
    np.testing.assert_array_equal(many.batch_at(0), np.concatenate(some(one, 2 * count + 1)))
    assert many.steps_per_epoch == count / (2 * count + 1)


def test_seeds_give_unrelated_orders(windows):
    count = windows.count("train")
    orders = {}
    for seed in (0, 1, 2**40):
        batches = Batches(windows, batch=1, seed=seed)
        for epoch in range(3):
            orders[seed, epoch] = tuple(batches.indices_at(epoch * count + i)[0] for i in range(count))
    assert len(set(orders.values())) == 9


def test_skipped_positions_are_left_out_and_nothing_else_changes(windows):
    plain = Batches(windows, batch=4, seed=1)
    skipping = Batches(windows, batch=4, seed=1, skipped=[(7, 9), (2, 4), (3, 5), (9, 9)])
    assert skipping.skipped == ((2, 5), (7, 9))
    assert [skipping.position(step) for step in range(7)] == [0, 1, 5, 6, 9, 10, 11]
    for step in range(7):
        np.testing.assert_array_equal(skipping.batch_at(step), plain.batch_at(skipping.position(step)))
    assert Batches(windows, batch=4, seed=1, skipped=[(0, 3)]).position(0) == 3


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10)).map(lambda t: (t[0], t[0] + t[1]))))
def test_merged_ranges_are_sorted_apart_and_hold_the_same_positions(ranges):
    merged = merge_ranges(ranges)
    assert {p for a, b in merged for p in range(a, b)} == {p for a, b in ranges for p in range(a, b)}
    assert all(before[1] < after[0] for before, after in itertools.pairwise(merged))
    assert all(a < b for a, b in merged)
    assert merge_ranges(merged) == merged


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_reading_ahead_changes_nothing_and_resumes_anywhere(windows, prefetch):
    batches = Batches(windows, batch=4, seed=2, skipped=[(3, 5)], prefetch=prefetch)
    straight = list(itertools.islice(batches.iterate(), 12))
    np.testing.assert_array_equal(straight, some(batches, 12))
    again = Batches(windows, batch=4, seed=2, skipped=[(3, 5)], prefetch=prefetch)
    np.testing.assert_array_equal(list(itertools.islice(again.iterate(5), 7)), straight[5:])


def test_bad_arguments_are_one_line_errors(windows):
    cases = {
        r"rows \[0, 6\] are none, or not all of a batch of 6": {"batch": 6, "rows": [0, 6]},
        r"rows \[\] are none": {"batch": 6, "rows": []},
        "batch is 0": {"batch": 0},
        "prefetch is -1": {"batch": 4, "prefetch": -1},
        r"skipped range \[5, 3\) is no range": {"batch": 4, "skipped": [(5, 3)]},
        "unknown split": {"batch": 4, "split": "dev"},
    }
    for says, arguments in cases.items():
        with pytest.raises(InputError, match=says):
            Batches(windows, seed=0, **arguments)
    with pytest.raises(InputError, match="step is -1"):
        Batches(windows, batch=4, seed=0).iterate(-1)
