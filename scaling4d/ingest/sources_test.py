import os
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling4d.errors import UserError
from scaling4d.ingest.sources import Source, files_digest, find_sources, held_out, name_bytes, printable

NAMES = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), unique=True, max_size=40)


@pytest.fixture
def tree(tmp_path) -> pathlib.Path:
    for name in (
        "b.mp4",
        "a/x.MKV",
        "a/y.webm",
        "a/notes.txt",
        "a/deep/er/z.mov",
        "c.avi",
        "d.m4v",
        "ground_truth/b.npz",
        ".hidden.mp4",
        ".cache/h.mp4",
        "chunks.mp4/part.mp4",
    ):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * len(name))
    return tmp_path / "in"


def names(inputs) -> list[str]:
    return [source.name for source in find_sources(inputs)]


def test_a_folder_is_searched_recursively_and_sorted(tree):
    found = ["a/deep/er/z.mov", "a/x.MKV", "a/y.webm", "b.mp4", "c.avi", "chunks.mp4/part.mp4", "d.m4v"]
    assert names(tree) == found
    assert names(str(tree) + "/") == found
    source = next(source for source in find_sources(tree) if source.name == "a/y.webm")
    assert source.path == tree / "a/y.webm" and source.size == len("a/y.webm") and source.modified > 0


def test_names_do_not_depend_on_where_the_folder_lies(tree, monkeypatch):
    monkeypatch.chdir(tree.parent)
    assert names("in") == names(tree) == names("./in")


def test_patterns_and_single_files(tree):
    assert names(f"{tree}/*.mp4") == ["b.mp4", "chunks.mp4/part.mp4"]
    assert names(f"{tree}/a/*") == ["deep/er/z.mov", "notes.txt", "x.MKV", "y.webm"]
    assert names(f"{tree}/**/*.webm") == ["a/y.webm"]
    assert names(tree / "c.avi") == ["c.avi"]
    assert names(tree / "a/notes.txt") == ["notes.txt"]  # asked for by name: opened, and skipped with its reason


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(tmp_path):
    (tmp_path / "take [1].mp4").write_bytes(b"x")
    assert names(tmp_path / "take [1].mp4") == ["take [1].mp4"]


def test_a_dangling_link_is_kept_to_be_listed(tree):
    (tree / "gone.mp4").symlink_to(tree / "nowhere")
    assert [source.size for source in find_sources(tree) if source.name == "gone.mp4"] == [-1]


@pytest.mark.parametrize("inputs", ["nothing", "nothing/*.mp4", "a/notes/*.mp4"])
def test_nothing_there_is_one_clear_line(tree, inputs):
    with pytest.raises(UserError, match="--input .*nothing|--input .*holds no videos"):
        find_sources(tree / inputs)
    with pytest.raises(UserError, match="^--video /"):
        find_sources(tree / inputs, "--video")


def test_a_folder_without_videos_or_that_cannot_be_listed_is_named(tree, monkeypatch):
    with pytest.raises(UserError, match="holds no videos"):
        find_sources(tree / "ground_truth")

    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="^--video: the folder .* cannot be listed: Permission denied"):
        find_sources(tree, "--video")


@given(NAMES, st.floats(0.0, 0.9))
def test_the_held_out_share_is_right_and_depends_on_names_alone(found, share):
    chosen = held_out(found, share)
    assert chosen == held_out(list(reversed(found)), share) and chosen <= set(found)
    if share == 0 or len(found) < 2:
        assert not chosen
    else:
        assert 1 <= len(chosen) < len(found)
        assert abs(len(chosen) - share * len(found)) <= 1


def test_growing_the_share_keeps_what_was_held_out():
    found = [f"video{i}.mp4" for i in range(100)]
    assert held_out(found, 0.05) < held_out(found, 0.1) < held_out(found, 0.5)
    assert held_out(found, 0.05) == {"video47.mp4", "video55.mp4", "video61.mp4", "video85.mp4", "video95.mp4"}


def test_the_digest_names_the_files():
    def digest(*files):
        return files_digest(Source(name, pathlib.Path("x"), size, 0) for name, size in files)

    assert digest(("a", 1), ("b", 2)) == digest(("a", 1), ("b", 2))
    assert len({digest(("a", 1), ("b", 2)), digest(("a", 1)), digest(("a", 12)), digest(("b", 1), ("a", 2))}) == 4


def test_names_of_any_bytes_can_be_stored_and_shown():
    name = os.fsdecode(b"caf\xe9\t\xc3\xa9\n.mp4")
    assert name_bytes(name) == b"caf\xe9\t\xc3\xa9\n.mp4"
    assert printable(name) == "caf\\xe9\\té\\n.mp4"
    printable(name).encode("utf-8")
