import errno

import pytest

from scaling4d.errors import UserError
from scaling4d.results_folder import ResultsFolder


def test_files_that_are_there_are_named(tmp_path):
    folder = ResultsFolder(tmp_path)
    folder.check_new(["a.json", "b.png"])
    folder.write_text("b.png", "x")
    with pytest.raises(UserError, match=r"b.png is there already: use another --output, or --overwrite"):
        folder.check_new(["a.json", "b.png"])


def test_too_little_space_is_named_in_megabytes(tmp_path, monkeypatch):
    monkeypatch.setattr(ResultsFolder, "free_bytes", lambda self: 3_000_000)
    ResultsFolder(tmp_path).check_space(3_000_000)
    with pytest.raises(UserError, match="20 MB are needed and 3 MB are free.*--output"):
        ResultsFolder(tmp_path).check_space(20_000_000)


def test_messages_name_the_flag_of_the_command(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot create .*file/folder: .* use another --output"):
        ResultsFolder(tmp_path / "file" / "folder").create()
    with pytest.raises(UserError, match="cannot write .*file/folder/x: .* use another --output"):
        ResultsFolder(tmp_path / "file" / "folder").write_text("x", "text")
    with pytest.raises(UserError, match="cannot write .*x: File too large; use another --output"):
        with ResultsFolder(tmp_path).replacing("x"):
            raise OSError(errno.EFBIG, "File too large")  # as where a file system has no larger files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
    with pytest.raises(UserError, match="--model_dir is wrong"), ResultsFolder(tmp_path).replacing("x"):
        raise UserError("--model_dir is wrong")  # of what is read meanwhile: not about the folder
