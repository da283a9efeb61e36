"""One small data set of clips for all tests of this folder; tests that damage it copy it first."""

import pathlib

import pytest

from tests import clip_sets


@pytest.fixture(scope="session")
def clip_set(tmp_path_factory) -> pathlib.Path:
    """20 training clips in three shards and 6 for validation, of 40 frames; see ``clip_sets.write_clip_set``."""
    directory = tmp_path_factory.mktemp("clips")
    clip_sets.write_clip_set(directory)
    return directory
