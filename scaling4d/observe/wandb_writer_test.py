"""Weights & Biases through a stand-in: which run, which mode, what is sent; and the real signatures if it is there."""

import contextlib
import inspect
import socket
import sys
import types

import numpy as np
import pytest

from scaling4d.errors import UserError
from scaling4d.observe.wandb_writer import WandbWriter
from scaling4d.run_folder import RunFolder
from tests import gcs_server


class FakeRun:
    def __init__(self):
        self.logged: list[tuple[dict, int]] = []
        self.finished = False

    def log(self, data, step=None):
        self.logged.append((data, step))

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch) -> types.ModuleType:
    """A module with the calls that are used; ``inits`` and ``runs`` tell what happened to it."""
    module = types.ModuleType("wandb")
    module.inits, module.runs = [], []

    def init(**arguments):
        module.inits.append(arguments)
        module.runs.append(FakeRun())
        return module.runs[-1]

    module.init = init
    module.Settings = lambda **arguments: arguments
    module.Image = lambda array: ("image", array.shape)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path / "my-run")


@contextlib.contextmanager
def server():
    """An address where something listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_what_is_sent(wandb, folder):
    folder.write_text("config.gin", "train.seed = 0\n")
    writer = WandbWriter(folder, project="p", entity="me")
    writer.truncate(3)
    writer.write(4, {"train/loss": 0.5})
    writer.images(4, {"rows": np.zeros((4, 6, 3), np.uint8)})
    writer.flush()
    writer.close()
    [run], [init] = wandb.runs, wandb.inits
    assert run.logged == [({"train/loss": 0.5}, 4), ({"rows": ("image", (4, 6, 3))}, 4)] and run.finished
    assert init["project"] == "p" and init["entity"] == "me" and init["name"] == "my-run"
    assert init["dir"] == str(folder) and init["config"] == {"gin": "train.seed = 0\n"}


def test_a_resume_continues_the_run_and_another_folder_has_its_own(wandb, folder, tmp_path):
    for _ in range(2):
        WandbWriter(folder).close()
    WandbWriter(RunFolder(tmp_path / "other")).close()
    first, second, other = (init["id"] for init in wandb.inits)
    assert first == second == folder.read_json("wandb.json")["id"] != other
    assert all(init["resume"] == "allow" for init in wandb.inits)


def test_offline_without_a_key(wandb, folder, monkeypatch):
    with server() as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        WandbWriter(folder)
    assert wandb.inits[0]["mode"] == "offline"


def test_offline_without_a_network(wandb, folder, monkeypatch):
    with server() as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
    monkeypatch.setenv("WANDB_API_KEY", "k")
    WandbWriter(folder)
    assert wandb.inits[0]["mode"] == "offline"


@pytest.mark.parametrize("where", ["environment", "netrc"])
def test_online_with_a_key_and_a_server(wandb, folder, monkeypatch, tmp_path, where):
    with server() as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        if where == "environment":
            monkeypatch.setenv("WANDB_API_KEY", "k")
        else:
            (tmp_path / "netrc").write_text("machine 127.0.0.1\n  login user\n  password k\n")
            (tmp_path / "netrc").chmod(0o600)
            monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        WandbWriter(folder)
    assert wandb.inits[0]["mode"] == "online"


def test_a_mode_that_was_asked_for_is_left_alone(wandb, folder, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    WandbWriter(folder)
    assert wandb.inits[0]["mode"] is None


def test_a_bucket_keeps_the_id_and_a_disk_the_files(wandb):
    with gcs_server.serve():
        folder = RunFolder("gs://bucket/my-run")
        WandbWriter(folder)
        assert folder.exists("wandb.json")
    assert "://" not in wandb.inits[0]["dir"] and wandb.inits[0]["name"] == "my-run"


def test_not_installed(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'scaling4d\[wandb\]'"):
        WandbWriter(folder)


def test_the_real_package_takes_these_calls(wandb, folder):
    WandbWriter(folder).close()
    sys.modules.pop("wandb")
    real = pytest.importorskip("wandb", reason="wandb is an optional extra")
    inspect.signature(real.init).bind(**wandb.inits[0])
    inspect.signature(real.Run.log).bind(None, {"a": 1.0}, step=3)
    inspect.signature(real.Run.finish).bind(None)
    inspect.signature(real.Image.__init__).bind(None, np.zeros((4, 4, 3), np.uint8))
    assert real.Settings(console="off").console == "off"
