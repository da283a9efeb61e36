import pytest

from scaling4d.data.blocked import BlockList, read_block_list
from scaling4d.errors import UserError
from tests import flaky_bucket

LIST = b"b.mp4\r\n\na/\xff.mp4\nb.mp4\n"
SOURCES = frozenset([b"a/\xff.mp4", b"b.mp4"])


def test_a_list_is_a_set_of_names_however_it_is_written(tmp_path, monkeypatch):
    (tmp_path / "list.txt").write_bytes(LIST)
    (tmp_path / "other").write_bytes(b"a/\xff.mp4\nb.mp4")
    found = read_block_list(str(tmp_path / "list.txt"))
    assert found.sources == SOURCES and found == read_block_list(str(tmp_path / "other")) and found.digest
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_block_list("list.txt") == read_block_list("~/list.txt") == found
    (tmp_path / "empty").write_bytes(b"\n\n")
    assert read_block_list("empty") == read_block_list("") == BlockList()


def test_a_list_may_lie_in_a_bucket():
    pytest.importorskip("obstore", reason="needs obstore: pip install 'scaling4d[gcs]'")
    with flaky_bucket.serve("gs") as bucket:
        bucket.put("lists/blocked.txt", LIST)
        assert read_block_list(f"{bucket.url}/lists/blocked.txt").sources == SOURCES
        with pytest.raises(
            UserError, match="gs://.*/lists/none.txt cannot be read: No such file; change --gin.ClipData"
        ):
            read_block_list(f"{bucket.url}/lists/none.txt")


@pytest.mark.parametrize("path", ["{}/none", "{}", "hdfs://host/list", "gs://b/../list"])
def test_a_list_that_cannot_be_read_is_one_line_with_its_flag(tmp_path, path):
    path = path.format(tmp_path)
    with pytest.raises(UserError, match="cannot be read.*--gin.ClipData.blocked") as error:
        read_block_list(path)
    assert path in str(error.value) and "\n" not in str(error.value)
