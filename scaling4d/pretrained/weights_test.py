"""Where weights are looked for, what of a download gets into the cache, and how arrays are put into a tree."""

import functools
import http.server
import pathlib
import threading

import jax
import numpy as np
import pytest

from scaling4d.errors import UserError
from scaling4d.models import position, released
from scaling4d.models.sizes import ModelSize
from scaling4d.pretrained.npz import NpzArrays
from scaling4d.pretrained.weights import check_weights, open_weights, place
from tests import weight_files

SIZE = ModelSize("custom", width=8, layers=11, mlp=6, heads=2)
VALUES = weight_files.backbone_values(SIZE, (4, 8, 8), (2, 4, 4))
READOUT = weight_files.readout_values(SIZE, (4, 8, 8), width=8, heads=2)


@pytest.fixture
def path(tmp_path):
    return weight_files.write_backbone(tmp_path / "backbone.npz", VALUES)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("SCALING4D_CACHE", str(folder))
    return folder


@pytest.fixture
def site(tmp_path):
    """(folder, address) of a web server."""
    folder = tmp_path / "site"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def same(arrays: released.NamedArrays) -> bool:
    return arrays.shapes.keys() == VALUES.keys() and all(
        np.array_equal(arrays.read(name), value) for name, value in VALUES.items()
    )


def test_paths_are_opened_as_text_and_as_paths(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    assert all(same(open_weights(one)) for one in (path, str(path), "backbone.npz", "./backbone.npz"))


def test_files_may_have_any_name(path):
    for name in ("weights", "4ds-dist-b", "120"):
        assert same(open_weights(path.rename(path.with_name(name))))
        path = path.with_name(name)


def test_a_released_name_is_the_file_in_the_cache(path, cache, monkeypatch):
    path.rename(cache / "scaling4d_dist_b.npz")
    arrays = open_weights("4ds-dist-b")
    assert same(arrays) and arrays.source == str(cache / "scaling4d_dist_b.npz")
    # A path of that name is a path.
    monkeypatch.chdir(cache)
    with pytest.raises(UserError):
        open_weights(pathlib.Path("4ds-dist-b"), step=1)
    (cache / "4ds-dist-b").mkdir()
    with pytest.raises(UserError, match="no checkpoints at"):
        open_weights(pathlib.Path("4ds-dist-b"))


def test_an_address_is_downloaded_once(path, cache, site):
    folder, address = site
    path.rename(folder / "120")  # a number at the end makes no step of it
    assert same(open_weights(f"{address}/120"))
    (folder / "120").unlink()
    assert same(open_weights(f"{address}/120"))


DAMAGES = {
    "no npz file": lambda data: b"<html>moved</html>",
    "another model": lambda data: data.replace(b"processor/layers_3", b"processor/layers_x"),
    "one bit": lambda data: data.replace(VALUES["processor/layers_7/mlp/dense_in/bias"].tobytes(), bytes(24)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_download_that_is_not_whole_does_not_get_into_the_cache(damage, path, cache, site):
    folder, address = site
    data = damage(path.read_bytes())
    assert data != path.read_bytes()
    (folder / "a.npz").write_bytes(data)
    with pytest.raises(UserError, match="what came is not what was asked for") as caught:
        open_weights(f"{address}/a.npz")
    assert str(caught.value).isprintable()
    assert not [one for one in cache.rglob("*") if one.is_file() and one.stat().st_size > 1000]
    (folder / "a.npz").write_bytes(path.read_bytes())
    assert same(open_weights(f"{address}/a.npz"))


def test_a_readout_of_another_kind_is_no_download(tmp_path):
    good = weight_files.write_depth(tmp_path / "good.npz", VALUES, READOUT)
    check_weights(good)
    bad = weight_files.write_depth(tmp_path / "bad.npz", VALUES, READOUT | {"readout/other": np.ones(2, np.float32)})
    with pytest.raises(UserError, match="'readout/other' belongs to no known model"):
        check_weights(bad)


@pytest.mark.parametrize(
    "source, words",
    [
        ("4ds-dist", "did you mean 4ds-dist-b"),
        ("none.npz", "none.npz: no such file"),
        ("gs:/none", "is no released name"),
        ("", "is no released name"),
    ],
)
def test_what_cannot_be_found_is_one_line(source, words, cache):
    with pytest.raises(UserError, match=words) as caught:
        open_weights(source)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("options", [{"step": 1}, {"step": 0}, {"ema": True}])
@pytest.mark.parametrize("source", ["4ds-dist-b", "https://example.org/a.npz", "a.npz"])
def test_only_runs_have_steps_and_averages(source, options):
    """Nothing is downloaded before that is said."""
    with pytest.raises(UserError, match=f"{source} is not a MODEL_DIR: only checkpoints of a run have steps"):
        open_weights(source, **options)


# Arrays in a tree.


def shapes() -> dict:
    stacked = {name.split("layers_0/")[1]: value for name, value in VALUES.items() if "/layers_0/" in name}
    flat = {name: value.shape for name, value in VALUES.items() if name.startswith("encoder/")}
    flat |= {f"processor/trunk/{name}": (11, *value.shape) for name, value in stacked.items()}
    return released.nested({name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in flat.items()})


def test_every_layer_lands_in_its_place(path):
    placed = place(NpzArrays(path), shapes(), "float32")
    for layer in range(11):
        np.testing.assert_array_equal(
            placed["processor"]["trunk"]["mlp"]["dense_in"]["kernel"][layer],
            VALUES[f"processor/layers_{layer}/mlp/dense_in/kernel"],
        )
    leaves = jax.tree.leaves(placed)
    assert all(isinstance(leaf, jax.Array) and leaf.devices() == {jax.devices()[0]} for leaf in leaves)


def test_the_position_table_is_resized_before_it_is_rounded(path):
    name = "encoder/posenc/embeddings"
    placed = place(NpzArrays(path), shapes(), "bfloat16", grid=(3, 4, 2))
    wanted = position.resize_table(VALUES[name], (3, 4, 2)).astype("bfloat16")
    np.testing.assert_array_equal(placed["encoder"]["posenc"]["embeddings"], wanted)
    assert {leaf.dtype for leaf in jax.tree.leaves(placed)} == {jax.numpy.dtype("bfloat16")}


def test_a_prefix_stands_before_the_names_of_the_tree(tmp_path):
    path = weight_files.write_depth(tmp_path / "depth.npz", VALUES, READOUT)
    names = {name.removeprefix("readout/"): value for name, value in READOUT.items()}
    tree = released.nested({name: jax.ShapeDtypeStruct(value.shape, np.float32) for name, value in names.items()})
    placed = dict(released.leaves(place(NpzArrays(path), tree, "float32", prefix="readout/")))
    assert placed.keys() == names.keys()
    assert all(np.array_equal(placed[name], value) for name, value in names.items())
