"""What a resumed run may change."""

import gin
import pytest

from scaling4d.config.changes import Change, diff
from scaling4d.errors import UserError

OLD = """
# a comment
train.model_dir = '/a'
train.total_steps = 100
train.batch_size = 8
train.seed = 0
train.log_period = 10
train.objective = @SimpleMAE()
train.partitioner = @Partitioner()
train.writers = [@JsonLinesWriter, @Theirs]
train.checkpoint = @SaveCheckpointConfig()
SimpleMAE.mask_ratio = 0.95
SimpleMAE.model = @VideoMAE()
VideoMAE.remat = 'none'
VideoMAE.size = 'tiny'
Partitioner.num_partitions = 1
JsonLinesWriter.name = 'x'
Theirs.level = 1
SaveCheckpointConfig.keep = 5
"""


def change(old: str, new: str) -> list[Change]:
    assert old in OLD
    return diff(OLD, OLD.replace(old, new))


def test_no_change():
    shuffled = "\n".join(reversed(OLD.splitlines())) + "\n# another comment\n"
    assert diff(OLD, shuffled) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("'/a'", "'/b'"),
        ("steps = 100", "steps = 200"),
        ("batch_size = 8", "batch_size = 16"),
        ("log_period = 10", "log_period = 1"),
        ("num_partitions = 1", "num_partitions = 2"),
        ("remat = 'none'", "remat = 'full'"),
        ("keep = 5", "keep = 1"),
        ("name = 'x'", "name = 'y'"),
        ("level = 1", "level = 2"),  # listed nowhere, but only train.writers uses it
        ("[@JsonLinesWriter, @Theirs]", "[]"),
        ("[@JsonLinesWriter, @Theirs]", "[@JsonLinesWriter, @Theirs, @Mine]\nMine.x = 1"),
        ("@Theirs]", "@small/Theirs]\nsmall/Theirs.level = 3"),
    ],
)
def test_may_change(old, new):
    changes = change(old, new)
    assert changes and all(one.allowed for one in changes), changes


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("seed = 0", "seed = 1", "train.seed"),
        ("0.95", "0.9", "SimpleMAE.mask_ratio"),
        ("'tiny'", "'S'", "VideoMAE.size"),
        ("SimpleMAE.mask_ratio = 0.95\n", "", "SimpleMAE.mask_ratio"),
        ("@SimpleMAE()", "@Other()", "train.objective"),
        ("train.seed = 0", "train.seed = 0\ntrain.unknown = 3", "train.unknown"),
        ("seed = 0", "seed = False", "train.seed"),
        ("model = @VideoMAE()", "model = @Theirs()", "SimpleMAE.model"),
    ],
)
def test_may_not_change(old, new, name):
    assert [one.name for one in change(old, new) if not one.allowed] == [name]


def test_what_an_essential_name_uses_is_essential_although_writers_use_it_too():
    old = OLD + "SimpleMAE.helper = @Theirs()\n"
    assert [one.allowed for one in diff(old, old.replace("level = 1", "level = 2"))] == [False]


def test_a_new_parameter_may_appear_with_its_default():
    @gin.register(module="changes_test")
    def grown(old=1, added=2):
        return old, added

    before = "train.objective = @grown()\ngrown.old = 1\n"
    assert diff(before, before + "grown.added = 2\n") == [Change("grown.added", None, "2", True)]
    assert diff(before, before + "grown.added = 3\n") == [Change("grown.added", None, "3", False)]


def test_values_and_sides():
    assert change("seed = 0", "seed = 1") == [Change("train.seed", "0", "1", False)]
    assert change("train.seed = 0\n", "") == [Change("train.seed", "0", None, False)]


def test_a_text_that_is_no_configuration():
    with pytest.raises(UserError, match="the run's configuration:1: gin syntax error"):
        diff("train.seed 0", OLD)
