import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling4d.data import order

KEYS = st.integers(0, 2**64 - 1)
GOLDEN_PLACES = [25, 860, 46, 285, 61, 512]
GOLDEN_DRAWS = [0.3893111656463384, 0.16049731665778588, 0.019312569401613855]


def test_splitmix64_gives_the_published_sequence():
    # The first outputs of the reference generator seeded with 1234567 (Vigna, https://prng.di.unimi.it/splitmix64.c):
    # output i is the mix of seed + i * golden gamma.
    state, outputs = 1234567, []
    for _ in range(5):
        outputs.append(order.splitmix64(state))
        state = (state + 0x9E3779B97F4A7C15) % 2**64
    assert outputs == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20))
def test_the_array_form_of_splitmix64_equals_the_scalar(values):
    array = order.splitmix64_array(np.array(values, np.uint64))
    assert array.tolist() == [order.splitmix64(value) for value in values]


@given(n=st.integers(1, 2000), key=KEYS)
def test_permute_is_a_bijection(n, key):
    assert sorted(order.permute(x, n, key) for x in range(n)) == list(range(n))


@given(n=st.integers(1, 2**40), key=KEYS, data=st.data())
def test_the_array_form_of_permute_equals_the_scalar(n, key, data):
    places = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20))
    array = order.permute_array(np.array(places, np.uint64), n, key)
    assert array.tolist() == [order.permute(x, n, key) for x in places]


def test_permute_at_full_scale_has_no_repeats_and_is_quick_to_seek():
    n = 170_000_000
    places = order.permute_array(np.arange(n - 200_000, n, dtype=np.uint64), n, order.derive_key(3))
    assert len(np.unique(places)) == 200_000 and places.max() < n


@pytest.mark.parametrize("n", [1000, 99_991, 1_000_000])
def test_neighbours_do_not_correlate(n):
    """tf.random.experimental.index_shuffle has +0.415 here for every seed."""
    for seed in range(3):
        places = order.permute_array(np.arange(n, dtype=np.uint64), n, order.derive_key(seed)).astype(np.float64)
        lag_one = np.corrcoef(places[:-1], places[1:])[0, 1]
        assert abs(lag_one) < 4 / np.sqrt(n)
        assert abs(np.abs(np.diff(places)).mean() / n - 1 / 3) < 2 / np.sqrt(n)


@pytest.mark.parametrize("n", [7, 16])
def test_successors_are_uniform_in_small_data_sets(n):
    """Which record follows which, over many keys; four rounds fail this by 15 to 49 standard deviations."""
    counts = np.zeros((n, n))
    for seed in range(2000):
        places = [order.permute(x, n, order.derive_key(seed)) for x in range(n)]
        counts[places[:-1], places[1:]] += 1
    pairs = counts[~np.eye(n, dtype=bool)]
    chi2, freedom = ((pairs - pairs.mean()) ** 2 / pairs.mean()).sum(), len(pairs) - 1
    assert chi2 < freedom + 5 * np.sqrt(2 * freedom)


def test_positions_are_uniform():
    """Where each of 10 places lands, over many keys: rows and columns add up, so 9 x 9 degrees of freedom."""
    n, trials = 10, 4000
    counts = np.zeros((n, n))
    for seed in range(trials):
        for x in range(n):
            counts[x, order.permute(x, n, order.derive_key(seed))] += 1
    chi2 = ((counts - trials / n) ** 2 / (trials / n)).sum() * (n - 1) / n
    assert chi2 < 81 + 5 * np.sqrt(2 * 81)


def test_every_epoch_holds_each_record_once_in_another_order():
    count, epochs = 37, []
    for epoch in range(3):
        records = []
        for index in range(epoch * count, (epoch + 1) * count):
            found_epoch, record = order.epoch_and_record(5, index, count, "shuffled")
            assert found_epoch == epoch
            records.append(record)
        assert sorted(records) == list(range(count))
        epochs.append(records)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_order_depends_on_seed_and_index_alone():
    def run(indices, seed=7):
        return {index: order.epoch_and_record(seed, index, 1000, "shuffled") for index in indices}

    forwards = run(range(500, 3500))
    assert run(reversed(range(500, 3500))) == forwards
    assert run(range(2000, 2100)).items() <= forwards.items()
    assert run(range(500, 3500), seed=8) != forwards
    assert order.epoch_and_record(7, 10**12, 1000, "shuffled")[0] == 10**9


def test_sequential_order_counts():
    assert [order.epoch_and_record(9, index, 3, "sequential") for index in range(5)] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 1),
    ]


def test_substitutes_differ_between_attempts():
    substitutes = [order.substitute_record(1, 123, 10_000, attempt) for attempt in (1, 2, 3)]
    assert len(set(substitutes)) == 3
    assert substitutes == [order.substitute_record(1, 123, 10_000, attempt) for attempt in (1, 2, 3)]


def test_golden_values_hold():
    """These are part of every run's data order: if they change, ORDER_VERSION must change."""
    assert order.ORDER_VERSION == 1
    assert [order.permute(x, 1000, order.derive_key(0, 1, 0)) for x in range(6)] == GOLDEN_PLACES
    draws = order.Draws(seed=1, index=2)
    assert [draws.uniform() for _ in range(3)] == GOLDEN_DRAWS


def test_draws_are_uniform_and_independent_of_each_other():
    values = np.array([[draws.uniform() for _ in range(4)] for draws in (order.Draws(3, g) for g in range(20_000))])
    assert values.min() >= 0 and values.max() < 1
    assert np.allclose(values.mean(axis=0), 0.5, atol=0.01) and np.allclose(values.var(axis=0), 1 / 12, atol=0.002)
    correlation = np.corrcoef(np.concatenate([values[:-1], values[1:]], axis=1).T)
    assert np.abs(correlation - np.eye(8)).max() < 0.035


def test_draws_below_covers_the_range():
    numbers = [order.Draws(0, index).below(3) for index in range(300)]
    assert set(numbers) == {0, 1, 2}


@given(count=st.integers(1, 600), block_records=st.integers(1, 9), seed=st.integers(0, 99), key=st.integers(0, 3))
def test_blocks_are_a_bijection_each_epoch(count, block_records, seed, key):
    for epoch in (0, 5):
        draws = range(epoch * count, (epoch + 1) * count)
        found = [order.epoch_and_record(seed, draw, count, "blocks", key, block_records) for draw in draws]
        assert {e for e, _ in found} == {epoch}
        assert sorted(record for _, record in found) == list(range(count))


def test_blocks_read_few_neighbourhoods_at_a_time_in_another_order_each_epoch():
    count, size = 100_000, 50
    window = size * order.WINDOW_BLOCKS
    for start in (0, 7 * window, count + window - count % window):
        records = [order.epoch_and_record(3, start + i, count, "blocks", 0, size)[1] for i in range(window)]
        assert len({record // size for record in records}) <= order.WINDOW_BLOCKS + 1
        assert np.abs(np.diff(records)).mean() > 10_000  # neighbours in the stream are far apart in the files
    first, second = ([order.epoch_and_record(3, e * count + i, count, "blocks")[1] for i in range(50)] for e in (0, 1))
    assert first != second
