import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling4d.data import mixture
from scaling4d.data.mixture import CHUNK, DataSet, Plan, block_draws
from scaling4d.data.order import epoch_and_record
from scaling4d.errors import UserError

GOLDEN_SMALL = [(1, 2), (0, 1), (1, 0), (0, 4), (0, 3), (0, 6), (0, 2), (0, 5), (1, 1), (0, 0), (0, 12), (0, 9)]
GOLDEN_LARGE = [(52, 25810957039), (59, 77570557605), (63, 145471573064), (63, 145471573151), (62, 124310493842)]
GOLDEN_KEYS = [108502842204813, 140444109015571]
RATES = st.lists(st.floats(0.01, 100), min_size=1, max_size=8)
SIZES = st.integers(1, 300)


def data_sets(rates, sizes=None) -> list[DataSet]:
    sizes = sizes or [10 * (i + 1) for i in range(len(rates))]
    return [DataSet(f"set{i:02}", sizes[i], f"records{i}", rate) for i, rate in enumerate(rates)]


def uneven(count=64) -> list[DataSet]:
    """170 million clips in data sets of 1,200 to 12 million, each at the rate of its size."""
    sizes = np.geomspace(3000, 60e6, count)
    sizes = (sizes * 170e6 / sizes.sum()).astype(int).tolist()
    return data_sets(sizes, sizes)


@given(RATES)
def test_every_block_has_the_rates_to_one_percent_and_every_data_set(rates):
    draws = block_draws([("x", rate) for rate in rates])
    exact = np.array(rates) / sum(rates)
    assert min(draws) >= 1
    assert np.abs(np.array(draws) / sum(draws) / exact - 1).max() <= 0.01
    assert np.abs(np.array(draws) - exact * sum(draws)).max() < 1  # largest remainder


def test_the_block_is_the_smallest_that_holds_the_rates():
    assert block_draws([("a", 0.7), ("b", 0.3)]) == [7, 3]
    assert block_draws([("a", 5.0)]) == [1]
    assert block_draws([("a", 2), ("b", 2), ("c", 4)]) == [1, 1, 2]
    assert sum(block_draws([("a", 1.0), ("b", 1e-5)])) == 2**21


@settings(max_examples=40)
@given(RATES, st.integers(0, 2**32), st.integers(1, 3))
def test_the_closed_form_draws_what_the_block_says_and_each_draw_once(rates, seed, blocks):
    plan = Plan.fresh(data_sets(rates), seed=seed)
    [segment] = plan.segments
    if segment.block > 3000:
        return
    seen = [plan.locate(index) for index in range(blocks * segment.block)]
    for source, share in enumerate(segment.shares):
        for block in range(blocks):
            part = seen[block * segment.block : (block + 1) * segment.block]
            assert sum(found == source for found, _ in part) == share.draws
        drawn = sorted(draw for found, draw in seen if found == source)
        assert drawn == list(range(blocks * share.draws))


def slow_walk(plan: Plan, positions: int):
    """Source by source from position 0 on, with counters as the only state: which draws a chunk holds."""
    [segment] = plan.segments
    counters = [0] * len(segment.shares)
    for start in range(0, positions, segment.chunk):
        here = [plan.locate(index) for index in range(start, start + segment.chunk)]
        for source in range(len(counters)):
            drawn = sorted(draw for found, draw in here if found == source)
            assert drawn == list(range(counters[source], counters[source] + len(drawn)))
            counters[source] += len(drawn)
    return counters


def test_the_closed_form_equals_a_walk_from_the_start_in_chunks_too():
    rates = [1.0, 0.3, 0.02, 0.0007]
    plan = Plan.fresh(data_sets(rates), seed=5)
    [segment] = plan.segments
    assert segment.block > CHUNK == segment.chunk
    counters = slow_walk(plan, segment.block)
    assert counters == [share.draws for share in segment.shares]


@settings(max_examples=40)
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=20), st.sampled_from([2, 8, 32]))
def test_chunks_spread_the_draws_evenly_and_exactly(weights, chunks):
    size = 64 * chunks
    draws = mixture._largest_remainder(np.array(weights) / sum(weights) * size, size)
    before = mixture._spread(draws.tolist(), chunks)
    rows = np.diff(before, axis=0)
    assert rows.min() >= 0 and (rows.sum(axis=1) == 64).all() and (before[-1] == draws).all()
    assert np.abs(before - np.outer(np.arange(chunks + 1), draws) / chunks).max() < 2


@settings(max_examples=30)
@given(st.lists(SIZES, min_size=2, max_size=4), st.sampled_from(["shuffled", "sequential", "blocks"]), st.data())
def test_no_record_repeats_within_an_epoch(sizes, order, data):
    rates = data.draw(st.lists(st.sampled_from([1.0, 2.0, 0.5]), min_size=len(sizes), max_size=len(sizes)))
    plan = Plan.fresh(data_sets(rates, sizes), seed=7)
    found: dict[tuple[int, int], list[int]] = {}
    for index in range(3000):
        source, draw = plan.locate(index)
        share = plan.segments[0].shares[source]
        epoch, record = epoch_and_record(7, draw, share.clips, order, share.key, block_records=4)
        found.setdefault((source, epoch), []).append(record)
    for (source, epoch), records in found.items():
        assert len(set(records)) == len(records)
        if (source, epoch + 2) in found:
            assert sorted(records) == list(range(sizes[source]))


@pytest.mark.parametrize("rates", [[1, 3, 1000], [1, 1, 1]])
def test_data_sets_of_one_three_and_a_thousand_records(rates):
    plan = Plan.fresh(data_sets(rates, [1, 3, 1000]), seed=7)
    [segment] = plan.segments
    counts = np.zeros(1000, int), np.zeros(1000, int), np.zeros(1000, int)
    blocks = -(-6000 // segment.block)
    for index in range(10**12 * segment.block, 10**12 * segment.block + blocks * segment.block):
        source, draw = plan.locate(index)
        share = segment.shares[source]
        counts[source][epoch_and_record(7, draw, share.clips, "shuffled", share.key)[1]] += 1
    assert [count.sum() for count in counts] == [blocks * share.draws for share in segment.shares]
    assert all(np.ptp(count[:size]) <= 2 for count, size in zip(counts, [1, 3, 1000], strict=True))


def test_one_data_set_is_ordered_as_without_a_mixture():
    plan = Plan.fresh([DataSet("alone", 20, "records")], seed=3)
    for index in (0, 5, 19, 20, 10**12):
        assert plan.locate(index) == (0, index)
    assert plan.segments[0].shares[0].key == 0


def test_data_sets_of_a_mixture_have_orders_of_their_own():
    a, b = Plan.fresh(data_sets([1, 1], [1000, 1000]), seed=3).segments[0].shares
    orders = [[epoch_and_record(3, draw, 1000, "shuffled", share.key)[1] for draw in range(100)] for share in (a, b)]
    assert orders[0] != orders[1]
    assert sum(x == y for x, y in zip(*orders, strict=True)) < 5


def test_a_far_position_needs_no_history():
    plan = Plan.fresh(uneven(), seed=1)
    began = time.perf_counter()
    source, draw = plan.locate(10**12)
    assert time.perf_counter() - began < 1
    share = plan.segments[0].shares[source]
    assert abs(draw / 10**12 / (share.draws / plan.segments[0].block) - 1) < 1e-4


def test_rare_data_sets_are_spread_over_the_block():
    plan = Plan.fresh(uneven(), seed=1)
    [segment] = plan.segments
    rarest = min(range(64), key=lambda source: segment.shares[source].draws)
    draws = segment.shares[rarest].draws
    counts = [segment.counters(position)[rarest] for position in range(0, segment.block, segment.block // 8)]
    assert np.abs(np.array(counts) - np.arange(8) * draws / 8).max() < 2


def test_evaluation_takes_every_clip_once():
    plan = Plan.each_once(data_sets([9, 1, 1], [3, 1, 5000]))
    seen = [plan.locate(index) for index in range(5004)]
    assert sorted(seen) == [(0, 0), (0, 1), (0, 2), (1, 0)] + [(2, draw) for draw in range(5000)]
    assert plan == Plan.each_once(data_sets([1, 1, 1], [3, 1, 5000]))


@given(st.integers(0, 400), st.integers(1, 4))
def test_repeats_share_a_draw_and_stand_side_by_side(index, repeats):
    sets = data_sets([2, 1], [7, 5])
    plan, plain = Plan.fresh(sets, seed=3, repeats=repeats), Plan.fresh(sets, seed=3)
    assert plan.locate(index) == plain.locate(index // repeats)


CHANGES = st.lists(
    st.tuples(st.lists(st.sampled_from("abcd"), min_size=1, unique=True), st.integers(0, 60)), max_size=4
)


@settings(max_examples=60)
@given(CHANGES, st.integers(1, 2))
def test_after_changes_of_the_mixture_nothing_is_drawn_twice(changes, repeats):
    def sets(names):
        return [DataSet(name, 40, name, 1.0 + "abcd".index(name)) for name in names]

    plan, at = Plan.fresh(sets("ab"), seed=3, repeats=repeats), 0
    for names, step in changes:
        at += step * repeats
        plan = plan.continued(Plan.fresh(sets(names), seed=3, repeats=repeats), at)
        assert Plan.from_json(3, json.loads(json.dumps(plan.to_json()))) == plan
    drawn = [
        (plan.segment_at(index).shares[plan.locate(index)[0]].name, plan.locate(index)[1])
        for index in range(0, at + 200, repeats)
    ]
    assert len(set(drawn)) == len(drawn)
    block = max(segment.block for segment in plan.segments)
    for name in "abcd":
        counts = sorted(draw for found, draw in drawn if found == name)
        skipped = (counts[-1] + 1 - len(counts)) if counts else 0
        assert skipped <= block * (len(changes) + 1)  # the rest of a chunk at each change, and the one that is open


@pytest.mark.parametrize("cut", [1, 4095, 4096, 6000, 3 * 4096 + 1])
def test_a_change_in_the_middle_of_a_long_block_passes_over_less_than_a_chunk(cut):
    sets = data_sets([1.0, 0.3, 0.02, 0.0007])
    plan = Plan.fresh(sets, seed=5)
    changed = plan.continued(Plan.fresh(sets[:2], seed=5), cut)
    seen = {plan.locate(index) for index in range(cut)}
    assert all(changed.locate(index) == plan.locate(index) for index in range(0, cut, 97))
    for source, share in enumerate(changed.segments[1].shares):
        drawn = [draw for found, draw in seen if found == source]
        assert max(drawn, default=-1) < share.first <= len(drawn) + CHUNK
    after = [changed.locate(index) for index in range(cut, cut + 3000)]
    assert len(set(after)) == 3000 and not seen & set(after)


def test_the_order_of_a_mixture_is_pinned():
    """Where these numbers change, every run on a mixture changes: raise ORDER_VERSION."""
    small, large = Plan.fresh(data_sets([0.7, 0.3]), seed=11), Plan.fresh(uneven(), seed=11)
    assert [small.locate(index) for index in range(12)] == GOLDEN_SMALL
    assert [large.locate(10**12 + index) for index in range(5)] == GOLDEN_LARGE
    assert [share.key for share in small.segments[0].shares] == GOLDEN_KEYS


def test_a_new_name_or_an_equal_rate_is_no_change():
    plan = Plan.fresh(data_sets([7, 3]), seed=3)
    renamed = [DataSet(new, s.clips, s.records, s.rate / 10) for new, s in zip("zy", data_sets([7, 3]), strict=True)]
    continued = plan.continued(Plan.fresh(renamed, seed=3), 1000)
    assert len(continued.segments) == 1 and continued.names == ("z", "y")
    assert [continued.locate(index) for index in range(50)] == [plan.locate(index) for index in range(50)]


def test_a_data_set_that_was_alone_goes_on_in_a_mixture_and_comes_back():
    alone, other = DataSet("a", 50, "ra"), DataSet("b", 50, "rb")
    plan = Plan.fresh([alone], seed=3)
    plan = plan.continued(Plan.fresh([alone, other], seed=3), 30)
    plan = plan.continued(Plan.fresh([other], seed=3), 50)
    plan = plan.continued(Plan.fresh([alone], seed=3), 60)
    first = [(share.name, share.first, share.key == 0) for one in plan.segments for share in one.shares]
    assert first == [("a", 0, True), ("a", 30, True), ("b", 0, False), ("b", 10, False), ("a", 40, True)]


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        ([1.0, 1e-8], ["set01", "within 1%", "raise its rate"]),
        ([1.0, 0.0], ["set01", "must be above 0"]),
        ([float("nan")], ["set00", "must be above 0"]),
        ([], ["no data sets"]),
    ],
)
def test_rates_that_cannot_be_name_the_data_set(rates, words):
    with pytest.raises(UserError) as error:
        Plan.fresh(data_sets(rates), seed=0)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_the_same_records_twice_are_refused():
    with pytest.raises(UserError, match="'a' and 'b' hold the same records"):
        Plan.fresh([DataSet("a", 5, "r"), DataSet("b", 5, "r")], seed=0)
    with pytest.raises(UserError, match="repeats = 0"):
        Plan.fresh([DataSet("a", 5, "r")], seed=0, repeats=0)
