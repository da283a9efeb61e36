"""Values to text and back, names that are nearly right, and files that are found."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling4d.config.syntax import (
    Macro,
    Reference,
    did_you_mean,
    find_file,
    flag_binding,
    format_value,
    leaves,
    map_value,
    parse_value,
)
from scaling4d.errors import UserError

TEXTS = st.text(st.characters(codec="utf-8"))
NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | TEXTS
    | st.builds(Reference, NAMES, st.booleans())
    | st.builds(Macro, NAMES)
)
VALUES = st.recursive(
    LEAVES,
    lambda v: st.lists(v, max_size=4) | st.lists(v, max_size=4).map(tuple) | st.dictionaries(TEXTS, v, max_size=3),
    max_leaves=8,
)


def same(a, b) -> bool:
    return type(a) is type(b) and repr(a) == repr(b)


@given(VALUES)
def test_text_and_back(value):
    assert same(parse_value(format_value(value)), value)


def test_what_has_no_text():
    for value in (object(), math.nan, [math.nan], {"a": object()}, (1, {2}), b"bytes", 1j, {1, 2}):
        assert format_value(value) is None


@given(VALUES)
def test_the_text_as_a_flag_is_the_value(value):
    assert same(flag_binding(f"NAME={format_value(value)}").value, value)


@given(TEXTS)
def test_a_flag_never_fails_but_by_a_user_error(text):
    try:
        binding = flag_binding(f"NAME={text}")
    except UserError:
        return
    assert binding.value == text.strip() if binding.bare else format_value(binding.value) is not None


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("NAME=1", "NAME"),
        ("scope/NAME=1", "scope/NAME"),
        ("f.x=1", "f.x"),
        ("a/b/f.x=1", "a/b/f.x"),
        ("module.f.x=1", "module.f.x"),
        (" NAME = 1 ", "NAME"),
    ],
)
def test_flag_names(text, name):
    assert flag_binding(text).name == name


@pytest.mark.parametrize("key", ["", "a..b", "a/", "/a", "a//b", "9x", "x-y", "%x", "@x", "a.", ".a", "a b", "a.b/c"])
def test_names_that_are_none(key):
    with pytest.raises(UserError, match="not a name"):
        flag_binding(f"{key}=1")


def test_near_names():
    known = ["TRAIN_STEPS", "BATCH_SIZE", "scaling4d.train"]
    assert did_you_mean("TRAINSTEPS", known) == "; did you mean 'TRAIN_STEPS'?"
    assert did_you_mean("train_steps", known) == "; did you mean 'TRAIN_STEPS'?"
    assert did_you_mean("BATCHSIZ", known) == "; did you mean 'BATCH_SIZE'?"
    assert did_you_mean("SOMETHING_ELSE_ENTIRELY", known) == ""
    assert did_you_mean("x", []) == ""


def test_files_are_found_in_order(tmp_path, monkeypatch):
    here, search = tmp_path / "here", tmp_path / "search"
    for folder in (here, search):
        (folder / "runs").mkdir(parents=True)
    (search / "runs" / "a.gin").write_text("")
    monkeypatch.chdir(here)
    assert find_file("runs/a.gin", "", [str(search)]) == search / "runs" / "a.gin"
    (here / "runs" / "a.gin").write_text("")
    assert str(find_file("runs/a.gin", "", [str(search)])) == "runs/a.gin"
    assert find_file(str(search / "runs" / "a.gin"), "", []) == search / "runs" / "a.gin"
    assert find_file("a.gin", str(here / "runs"), [str(search)]) == here / "runs" / "a.gin"
    with pytest.raises(UserError, match="no gin file 'runs/b.gin'; did you mean 'runs/a.gin'"):
        find_file("runs/b.gin", "", [str(search)])
    with pytest.raises(UserError, match="no gin file"):
        find_file("runs", "", [])


def test_walking():
    value = {"a": [1, (2, "b")], "c": Macro("X")}
    assert list(leaves(value)) == ["a", 1, 2, "b", "c", Macro("X")]
    assert map_value(lambda leaf: 5 if leaf == Macro("X") else leaf, value) == {"a": [1, (2, "b")], "c": 5}
