"""Mixtures through the whole of ``data/``: what is drawn, resuming, hosts, block lists, bad files, repeats."""

import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest

from scaling4d.data import tally
from scaling4d.data.clip_data import ClipData
from scaling4d.data.clips import load_clip
from scaling4d.data.decode import ClipSettings
from scaling4d.data.manifest import open_split, read_manifest
from scaling4d.data.order import epoch_and_record
from scaling4d.data.resume import Resume
from scaling4d.data.stream import ClipStream
from scaling4d.data.tasks import register_clips, register_mixture
from scaling4d.data.tensorflow_setup import seqio
from scaling4d.errors import UserError
from scaling4d.main import main
from tests import clip_sets
from tests.conftest import SMALL_RUN
from tests.video_files import read_code

SETTINGS = ClipSettings(frames=2, size=48, stride=1)
WHOLE = ClipSettings(frames=1, size=96, scale=(1.0, 1.0), ratio=(160 / 96, 160 / 96))  # the code can be read
SIZES = {"one": 1, "three": 3, "many": 40}
RATES = {"one": 1.0, "three": 2.0, "many": 5.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Data sets of 1, 3 and 40 clips; the first has no held-out clips."""
    root = tmp_path_factory.mktemp("sets")
    for number, (name, clips) in enumerate(SIZES.items()):
        clip_sets.write_clip_set(root / name, train=clips, validation=number * 2, frames=4, shard_clips=16)
    return {name: root / name for name in SIZES}


@pytest.fixture(scope="module")
def task(folders):
    register_mixture("mixture_test", {name: (folders[name], RATES[name]) for name in SIZES})
    return "mixture_test"


def stream(task, **changes) -> ClipStream:
    arguments = {"split": "train", "settings": SETTINGS, "seed": 3, "batch_size": 8, "threads": 2}
    return ClipStream(task=task, **(arguments | changes))


def batches(task, count, **changes) -> list[dict[str, np.ndarray]]:
    with stream(task, **changes) as found:
        return [next(found) for _ in range(count)]


def joined(found, name) -> np.ndarray:
    return np.concatenate([batch[name] for batch in found])


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def test_each_example_is_the_draw_that_the_plan_says(task, folders):
    with stream(task, settings=WHOLE) as found:
        assert found.sources == ("many", "one", "three") and found.num_examples == 44
        plan, some = found.plan, [next(found) for _ in range(10)]
    sources, videos = joined(some, "source"), joined(some, "video")
    for index in range(80):
        source, draw = plan.locate(index)
        share = plan.segments[0].shares[source]
        _, record = epoch_and_record(3, draw, share.clips, "shuffled", share.key)
        assert sources[index] == source and read_code(videos[index][0])[1] == record
    for block in range(10):
        assert np.bincount(sources[8 * block : 8 * block + 8]).tolist() == [5, 1, 2]


def test_an_epoch_of_each_data_set_has_every_clip_once(task):
    some = batches(task, 16, settings=WHOLE)
    sources = joined(some, "source")
    codes = np.array([read_code(frame)[1] for [frame] in joined(some, "video")])
    many, three = codes[sources == 0], codes[sources == 2]
    assert len(many) == 80 and sorted(many) == sorted(list(range(40)) * 2)
    assert sorted(three[:30]) == sorted(list(range(3)) * 10)
    assert not codes[sources == 1].any()


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_together_read_the_same_global_batches(task, hosts):
    whole = batches(task, 3, start=10**12)
    share = 8 // hosts
    parts = [batches(task, 3, start=10**12, slots=range(h * share, (h + 1) * share)) for h in range(hosts)]
    for step in range(3):
        assert_equal(whole[step], {name: np.concatenate([p[step][name] for p in parts]) for name in whole[step]})


@pytest.mark.parametrize("order", ["shuffled", "blocks"])
def test_a_start_at_any_index_equals_the_stream_that_was_not_interrupted(task, order):
    arguments = {"order": order, "block_records": 3}
    whole = batches(task, 6, **arguments)
    for done in (1, 3, 5):
        for expected, found in zip(whole[done:], batches(task, 6 - done, start=8 * done, **arguments), strict=True):
            assert_equal(expected, found)


def test_the_plain_api_lists_and_yields_the_same_tasks(task):
    mixture = seqio.get_mixture_or_task(task)
    with stream(task) as found:
        assert tuple(one.name for one in mixture.tasks) == found.sources
    rates = [mixture.get_rate(one) for one in mixture.tasks]
    assert rates == [RATES[one.name] for one in mixture.tasks]
    plain = mixture.get_dataset(split="train", shuffle=True, seed=1, num_epochs=1, trim_output_features=False)
    assert next(iter(plain.take(1).as_numpy_iterator()))["video"].shape == (16, 224, 224, 3)
    for one in mixture.tasks:
        dataset = one.get_dataset(split="train", shuffle=False)
        assert sum(1 for _ in dataset.as_numpy_iterator()) == SIZES[one.name]


def test_nested_mixtures_take_their_share(task, folders):
    register_clips("mixture_test_extra", folders["many"].parent / "extra")
    clip_sets.write_clip_set(folders["many"].parent / "extra", train=2, validation=1, frames=4)
    seqio.MixtureRegistry.add("mixture_test_nested", [(task, 1.0), ("mixture_test_extra", 3.0)])
    with stream("mixture_test_nested") as found:
        [segment] = found.plan.segments
        rates = {share.name: share.draws / segment.block for share in segment.shares}
    assert rates == {"one": 1 / 32, "three": 2 / 32, "many": 5 / 32, "mixture_test_extra": 24 / 32}


def test_preprocessors_in_a_mixture_are_refused_in_one_line(folders):
    from scaling4d.data.source import ClipSource

    seqio.TaskRegistry.add(
        "mixture_test_dark",
        source=ClipSource(folders["three"]),
        preprocessors=[lambda dataset: dataset],
        output_features=seqio.TaskRegistry.get("three").output_features,
        shuffle_buffer_size=None,
    )
    seqio.MixtureRegistry.add("mixture_test_dim", [("mixture_test_dark", 1.0), ("many", 1.0)])
    with pytest.raises(UserError, match="'mixture_test_dark' in mixture 'mixture_test_dim' has preprocessors"):
        stream("mixture_test_dim")


def test_evaluation_takes_every_held_out_clip_once_and_skips_a_data_set_without(task):
    data = ClipData(task=task, settings=ClipSettings(frames=1, size=96))
    assert data.num_clips("validation") == 6 and data.num_clips("train") == 44
    with data.held_out_stream(batch_size=6, slots=range(6)) as found:
        first = next(found)
        assert found.sources == ("many", "three")
    assert np.bincount(first["source"]).tolist() == [4, 2]
    with dataclasses.replace(data, seed=9).held_out_stream(batch_size=3, slots=range(3)) as found:
        np.testing.assert_array_equal(first["video"], joined([next(found), next(found)], "video"))
    assert sorted(found.plan.locate(index) for index in range(6)) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]


# -- Resuming ----------------------------------------------------------------------------------------------------------


def checkpoint(found: ClipStream, at: int) -> dict:
    """A checkpoint's ``data`` item after its way through JSON."""
    return json.loads(json.dumps(found.state(at)))


def test_a_changed_mixture_begins_a_segment_when_that_is_meant(task, folders):
    register_mixture("mixture_test_next", {"many": (folders["many"], 1.0), "three": (folders["three"], 1.0)})
    with stream(task, settings=WHOLE) as found:
        before, data = [next(found) for _ in range(4)], checkpoint(found, 32)
    with pytest.raises(UserError) as error:
        stream("mixture_test_next", start=32, resume=Resume(data, "STEP 4"))
    for words in (
        "STEP 4 was saved on other data",
        "'one' (1 clips",
        "was 0.25 of the clips, is 0.5",
        "--allow_config",
    ):
        assert words in str(error.value)
    with stream("mixture_test_next", start=32, settings=WHOLE, resume=Resume(data, "STEP 4", True)) as found:
        assert len(found.notes) == 1 and "from example 32 on" in found.notes[0]
        after, data = [next(found) for _ in range(5)], checkpoint(found, 72)
    assert [segment["start"] for segment in data["plan"]] == [0, 32]
    codes = [read_code(frame)[1] for [frame] in joined(before, "video")[joined(before, "source") == 0]]
    codes += [read_code(frame)[1] for [frame] in joined(after, "video")[joined(after, "source") == 0]]
    assert sorted(codes[:40]) == list(range(40))  # the epoch that began before the change goes on after it
    # Without the flag it goes on: the checkpoint's plan is that of the new mixture.
    with stream("mixture_test_next", start=72, resume=Resume(data, "STEP 9")) as found:
        assert not found.notes
        resumed = next(found)
    assert_equal(resumed, batches_of(data, "mixture_test_next", 72))


def batches_of(data, task, start):
    with stream(task, start=start, resume=Resume(data, "again")) as found:
        return next(found)


def test_a_new_name_is_no_other_data(folders, tmp_path):
    shutil.copytree(folders["many"], tmp_path / "moved")
    register_clips("mixture_test_moved", tmp_path / "moved")
    register_mixture(
        "mixture_test_renamed", {"mixture_test_moved": (tmp_path / "moved", 5), "one": ("", 1), "three": ("", 2)}
    )
    for old, new in (("many", "mixture_test_moved"), ("mixture_test", "mixture_test_renamed")):
        with stream(old) as found:
            expected, data = [next(found) for _ in range(2)], checkpoint(found, 8)
        with stream(new, start=8, resume=Resume(data, "STEP 1")) as found:
            assert not found.notes and "mixture_test_moved" in found.sources
            assert_equal(next(found), expected[1])


def test_a_checkpoint_from_before_there_were_plans_goes_on(folders):
    with stream("many") as found:
        expected, data = [next(found) for _ in range(2)], checkpoint(found, 8)
    old = {key: data[key] for key in ("next_example", "fingerprint")}
    with stream("many", start=8, resume=Resume(old, "STEP 1")) as found:
        assert_equal(next(found), expected[1])
    with pytest.raises(UserError, match="seed was 3, is 4"):
        stream("many", start=8, seed=4, resume=Resume(old, "STEP 1", True))
    with pytest.raises(UserError, match="'three' .* is new"):
        stream("three", start=8, resume=Resume(old, "STEP 1"))


@pytest.mark.slow
def test_a_run_on_a_mixture_goes_on_with_another_one(folders, tmp_path, capfd):
    """Through the command: rates in DATA_DIR, and the flag that says a change is meant."""

    def train(rate: float, *flags: str, steps: int) -> tuple[int, str]:
        parts = {"many": (str(folders["many"]), rate), "three": (str(folders["three"]), 1.0)}
        words = [f"--gin.DATA_DIR={parts}", f"--gin.ClipData.task='mixture_test_run_{rate:g}'", *flags]
        words += [f"--model_dir={tmp_path / 'run'}", f"--gin.TRAIN_STEPS={steps}"]
        code = main(["train", *SMALL_RUN, "--gin.EVAL_PERIOD=0", *words])
        return code, "".join(capfd.readouterr())

    code, output = train(3.0, "--dry_run", "--gin.ClipData.repeats=2", steps=4)
    for words in ("4 (32 clips, 0.7 epochs; each record 2 times in a row: 16 records, 0.4 epochs)", "three: 25.000%"):
        assert words in output
    assert code == 0
    assert train(3.0, steps=2)[0] == 0
    code, output = train(1.0, steps=4)
    assert code == 1 and "'three' was 0.25 of the clips, is 0.5" in output and "--allow_config_changes" in output
    code, output = train(1.0, "--allow_config_changes", steps=4)
    assert code == 0 and "data from example 16 on: " in output
    rows = [json.loads(line) for line in (tmp_path / "run/train/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row.get("data/blocked") == 0.0 == row.get("data/bad_read")] == [1, 2, 3, 4]
    data = json.loads(next((tmp_path / "run/checkpoints/4/data").glob("*")).read_text())
    assert [segment["start"] for segment in data["plan"]] == [0, 16] and data["next_example"] == 32


# -- Blocked and bad ---------------------------------------------------------------------------------------------------


def test_blocked_sources_are_replaced_counted_and_recorded(task, tmp_path):
    blocked = tmp_path / "blocked.txt"
    blocked.write_bytes(b"train/007.mp4\r\ntrain/002.mp4\n\n")
    plain = batches(task, 8, settings=WHOLE)
    with stream(task, settings=WHOLE, blocked=str(blocked)) as found:
        some = [next(found) for _ in range(8)]
        counts, data = found.counts(), checkpoint(found, 64)
    bad = joined(some, "bad")
    codes = np.array([read_code(frame)[1] for [frame] in joined(plain, "video")])
    np.testing.assert_array_equal(bad == 3, np.isin(codes, [7, 2]))
    assert counts.pop("blocked") == (bad == 3).sum()
    assert counts == dict.fromkeys(("bad_read", "bad_decode", "read_retries", "worker_deaths"), 0)
    good = bad == 0
    np.testing.assert_array_equal(joined(some, "video")[good], joined(plain, "video")[good])
    shown = {read_code(frame)[1] for [frame] in joined(some, "video")}
    assert not shown & {7, 2} and joined(some, "weight").all()
    [entry] = data["blocked"]
    assert (entry["start"], entry["sources"]) == (0, 2)
    blocked.write_text("train/002.mp4\ntrain/007.mp4\n")  # the same names
    with stream(task, start=64, blocked=str(blocked), resume=Resume(data, "STEP 8")) as found:
        assert not found.notes and found.state(64)["blocked"] == data["blocked"]
    blocked.write_text("train/002.mp4\n")
    with stream(task, start=64, blocked=str(blocked), resume=Resume(data, "STEP 8")) as found:
        assert found.notes == ["blocked sources from example 64 on: 1 (were 2)"]
        assert [one["start"] for one in found.state(64)["blocked"]] == [0, 64]
    with pytest.raises(UserError, match="ClipData.blocked"):
        stream(task, blocked=str(tmp_path / "nothing"))


def test_where_all_is_blocked_clips_are_zeros(tmp_path):
    (tmp_path / "blocked.txt").write_text("train/000.mp4\n")
    [batch] = batches("one", 1, blocked=str(tmp_path / "blocked.txt"))
    assert (batch["bad"] == 3).all() and not batch["weight"].any() and not batch["video"].any()


def test_too_many_bad_clips_end_the_stream_with_the_worst_files(folders, tmp_path, monkeypatch):
    shutil.copytree(folders["many"], tmp_path / "damaged")
    names = [shard.name for shard in read_manifest(tmp_path / "damaged").splits["train"].shards]
    (tmp_path / "damaged" / names[1]).unlink()  # 16 of 40
    shard = bytearray((tmp_path / "damaged" / names[2]).read_bytes())
    shard[60] ^= 1
    (tmp_path / "damaged" / names[2]).write_bytes(shard)
    register_mixture("mixture_test_bad", {"mixture_test_damaged": (tmp_path / "damaged", 5.0), "three": ("", 1.0)})
    monkeypatch.setattr(tally, "ENOUGH_CLIPS", 48)
    with stream("mixture_test_bad", batch_size=12, max_bad_share=0.5) as found:
        some = [next(found) for _ in range(4)]
        assert found.counts()["bad_read"] == (joined(some, "bad") == 1).sum() == 17  # 40 of 48 are one epoch
    with stream("mixture_test_bad", batch_size=12, max_bad_share=0.3) as found:
        with pytest.raises(UserError) as error:
            for _ in range(4):
                next(found)
    lines = str(error.value).splitlines()
    assert "17 of 48 clips on this host are bad (17 not read, 0 not decoded)" in lines[0]
    assert "--gin.ClipData.max_bad_share" in lines[0]
    assert lines[2].endswith(f"damaged/{names[1]}") and lines[3].endswith(f"damaged/{names[2]}") and len(lines) == 4


# -- Repeats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixture_test", "many"])
def test_repeats_are_clips_of_one_record_with_randomness_of_their_own(task, name):
    cropped = ClipSettings(frames=2, size=48, stride=1, scale=(0.3, 0.9))
    plain = batches(name, 1, settings=cropped)[0]
    with stream(name, settings=cropped, repeats=4) as found:
        plan, some = found.plan, [next(found) for _ in range(4)]
    videos, sources = joined(some, "video"), joined(some, "source")
    for index in range(32):
        assert plan.locate(index) == plan.locate(index // 4 * 4) and sources[index] == plan.locate(index)[0]
    assert len({video.tobytes() for video in videos}) > 24  # the pictures have few colors: crops may look the same
    np.testing.assert_array_equal(videos[0], plain["video"][0])
    # Any slots, one by one or in groups, on any host, and from any start.
    for slots in ([0, 1, 2, 3], [1, 2, 5], [6]):
        part = batches(name, 3, settings=cropped, repeats=4, start=8, slots=slots)
        for step in range(3):
            assert_equal(part[step], {key: rows[slots] for key, rows in some[step + 1].items()})
    odd = batches(name, 2, settings=cropped, repeats=4, start=6, batch_size=4)
    np.testing.assert_array_equal(joined(odd, "video"), videos[6:14])


def test_a_repeat_reads_its_record_once(folders, monkeypatch):
    from scaling4d.data.records import ShardedRecords

    reads, read = [], ShardedRecords.read
    monkeypatch.setattr(ShardedRecords, "read", lambda self, record: reads.append(record) or read(self, record))
    batches("many", 1, repeats=4, batch_size=8, prefetch=1, threads=1)
    drawn = [epoch_and_record(3, draw, 40, "shuffled")[1] for draw in range(len(reads))]
    assert reads == drawn and len(reads) <= 8


# -- A data set from outside -------------------------------------------------------------------------------------------


def test_a_package_outside_adds_a_data_set_with_one_registration_and_one_gin_line(folders, tmp_path, monkeypatch):
    from scaling4d import config, configurables

    package = tmp_path / "elsewhere"
    package.mkdir()
    package.joinpath("__init__.py").write_text("")
    registration = f"register_clips('elsewhere_clips', {str(folders['three'])!r})"
    package.joinpath("clips.py").write_text(f"from scaling4d.data.tasks import register_clips\n{registration}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = tmp_path / "run.gin"
    recipe.write_text(
        "import elsewhere.clips\n"
        "include 'pretrain/tiny.gin'\n"
        f"DATA_DIR = {{'many': ({str(folders['many'])!r}, 0.75), 'elsewhere_clips': ('', 0.25)}}\n"
        "ClipData.task = 'mixture_test_elsewhere'\n"
    )
    configurables.register()
    config.parse([str(recipe)], ["train.model_dir='none'"], roots=["train"])
    data = configurables.build_run().data
    assert [(one.name, one.rate) for one in data.data_sets("train")] == [("elsewhere_clips", 0.25), ("many", 0.75)]
    with data.train_stream(batch_size=4, slots=range(4), start=0) as found:
        assert np.bincount(next(found)["source"]).tolist() == [1, 3]
    sys.modules.pop("elsewhere.clips")


@pytest.mark.parametrize(
    ("parts", "complaint"),
    [
        ({"many": ("", 0.0)}, "the rate of data set 'many' is 0.0"),
        ({"nobody": ("", 1.0)}, "'nobody' has no folder and no task"),
        ({"many": ("", 1.0), "mixture_test_bad_name": ("", 1.0)}, "no folder"),
        ({}, "no data sets"),
        ({"many": ("/elsewhere", 1.0)}, "'many' is already taken"),
    ],
)
def test_mistakes_in_a_mixture_are_one_clear_line(task, parts, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        register_mixture("mixture_test_mistake", parts)
    assert "\n" not in str(error.value)


def test_a_mixture_cannot_take_a_name_that_is_taken(task):
    with pytest.raises(UserError, match="'many' is a data set.*ClipData.task"):
        register_mixture("many", {"one": ("", 1.0)})
    with pytest.raises(UserError, match="'mixture_test' is already taken"):
        register_mixture("mixture_test", {"one": ("", 1.0)})


def test_one_data_set_alone_is_as_it_always_was(folders):
    records = open_split(folders["many"], read_manifest(folders["many"]), "train")
    [batch] = batches("many", 1, start=10**6)
    for slot in range(8):
        expected = load_clip(records, 10**6 + slot, seed=3, order="shuffled", settings=SETTINGS)
        np.testing.assert_array_equal(batch["video"][slot], expected.video)
    with stream("many") as found:
        assert found.fingerprint == {
            "task": "many",
            "split": "train",
            "clips": 40,
            "records": read_manifest(folders["many"]).fingerprint(),
            "order": "shuffled",
            "order_version": 1,
            "seed": 3,
        }
