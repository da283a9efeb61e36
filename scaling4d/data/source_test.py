import numpy as np
import pytest

from scaling4d.data.decode import ClipSettings
from scaling4d.data.source import ClipSource, StreamPosition
from scaling4d.data.stream import ClipStream
from scaling4d.data.tasks import register_clips
from scaling4d.data.tensorflow_setup import seqio, tf
from scaling4d.errors import UserError

SETTINGS = ClipSettings(frames=4, size=48, stride=2)


@pytest.fixture(scope="module")
def task(clip_set) -> "seqio.Task":
    return register_clips("source_test", clip_set, SETTINGS)


def indices(dataset) -> list[int]:
    return [int(high) << 32 | int(low) for high, low in (element["index"] for element in dataset.as_numpy_iterator())]


def test_the_task_is_found_by_name_and_lists_what_it_has(task, clip_set):
    found = seqio.get_mixture_or_task("source_test")
    assert found is task
    assert list(found.splits) == ["train", "validation"]
    assert found.source.list_shards("train") == [f"train-0000{n}.tfrecord" for n in range(3)]
    assert found.output_features["video"].rank == 4
    assert found.num_input_examples("train") is None  # else seqio would cache small data sets in memory


def test_the_plain_api_yields_one_epoch(task):
    dataset = task.get_dataset(split="train", shuffle=True, seed=5)
    elements = list(dataset.as_numpy_iterator())
    assert len(elements) == 20
    assert elements[0]["video"].shape == (4, 48, 48, 3) and elements[0]["video"].dtype == np.uint8
    assert indices(dataset) == list(range(20))
    assert len(list(task.get_dataset(split="validation", shuffle=False).as_numpy_iterator())) == 6
    same = list(task.get_dataset(split="train", shuffle=True, seed=5).as_numpy_iterator())
    assert all(np.array_equal(a["video"], b["video"]) for a, b in zip(elements, same, strict=True))


def test_the_plain_api_shards_by_example_though_there_are_fewer_files(task):
    shards = [indices(task.get_dataset(split="train", seed=5, shard_info=seqio.ShardInfo(i, 8))) for i in range(8)]
    assert sorted(sum(shards, [])) == list(range(20))
    assert shards[3] == [3, 11, 19]


def test_a_position_travels_through_the_unmodified_api(task):
    position = StreamPosition(start=10**9, batch_size=6, slots=(4, 1), seed=2, settings=SETTINGS, threads=2)
    dataset = task.get_dataset(split="train", seed=2, shard_info=position, trim_output_features=False)
    expected = [10**9 + 4, 10**9 + 1, 10**9 + 10, 10**9 + 7]
    assert indices(dataset.take(4)) == expected
    with ClipStream(
        task="source_test", split="train", settings=SETTINGS, seed=2, batch_size=6, slots=(4, 1), start=10**9
    ) as stream:
        batch = next(stream)
    plain = list(dataset.take(2).as_numpy_iterator())
    assert np.array_equal(batch["video"], np.stack([element["video"] for element in plain]))


def test_seqio_get_dataset_and_feature_converter_work(task):
    dataset = seqio.get_dataset(
        "source_test",
        task_feature_lengths=None,
        feature_converter=seqio.PassThroughFeatureConverter(),
        dataset_split="train",
        shuffle=True,
        seed=0,
        trim_output_features=False,
    )
    assert next(dataset.as_numpy_iterator())["video"].shape == (4, 48, 48, 3)


def test_preprocessors_of_a_task_of_ones_own_apply_in_the_stream_too(clip_set):
    """What a package outside the repository does to add a data set with its own preprocessing."""

    def darken(dataset: tf.data.Dataset) -> tf.data.Dataset:
        return dataset.map(lambda element: {**element, "video": element["video"] // 2})

    seqio.TaskRegistry.add(
        "source_test_dark",
        source=ClipSource(clip_set),
        preprocessors=[darken],
        output_features={"video": seqio.ContinuousFeature(dtype=tf.uint8, rank=4)},
        shuffle_buffer_size=None,
    )
    videos = []
    for name in ("source_test", "source_test_dark"):
        with ClipStream(task=name, split="train", settings=SETTINGS, seed=2, batch_size=2) as stream:
            videos.append(next(stream)["video"])
    assert np.array_equal(videos[0] // 2, videos[1])


def test_registering_again_is_fine_and_taking_a_name_is_not(task, clip_set, tmp_path):
    assert register_clips("source_test", str(clip_set) + "/../" + clip_set.name) is task
    with pytest.raises(UserError, match="'source_test' is already taken"):
        register_clips("source_test", tmp_path)
    with pytest.raises(UserError, match="cannot be a task name"):
        register_clips("two words", tmp_path)


@pytest.mark.parametrize("address", ["http://host/clips", "gs://", "s3://bucket/../clips"])
def test_an_address_that_is_none_is_refused_where_it_is_given(address):
    with pytest.raises(UserError, match=address):
        register_clips("source_test_address", address)
    assert "source_test_address" not in seqio.TaskRegistry.names()


def test_a_folder_without_clips_is_named_when_the_task_is_used(tmp_path):
    task = register_clips("source_test_empty", tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no clips"):
        task.get_dataset(split="train")


def test_a_stream_of_something_else_is_refused(task):
    def numbers(split, shuffle_files, seed=None):
        return tf.data.Dataset.range(3)

    source = seqio.FunctionDataSource(numbers, splits=["train"])
    seqio.TaskRegistry.add("source_test_other", source=source, output_features=task.output_features)
    seqio.MixtureRegistry.add("source_test_mixed", [("source_test", 1.0), ("source_test_other", 1.0)])
    for name in ("source_test_other", "source_test_mixed"):
        with pytest.raises(UserError, match="'source_test_other' is no task that reads clips"):
            ClipStream(task=name, split="train", settings=SETTINGS, seed=2, batch_size=2)


def test_accelerators_are_hidden_from_tensorflow():
    assert not tf.config.get_visible_devices("GPU") and not tf.config.get_visible_devices("TPU")
