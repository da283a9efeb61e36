"""The command line answers fast and loads nothing it does not need."""

import subprocess
import sys
import time

import pytest

from scaling4d import main


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["ingest", "--help"], ["synth", "--help"]])
def test_help_answers_under_a_second(arguments):
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = subprocess.run([sys.executable, "-m", "scaling4d.main", *arguments], capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
        assert result.returncode == 0 and "usage" in result.stdout
    assert min(seconds) < 1.0


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from scaling4d import main; main.main(['--help']); main.main(['train', '--help']); "
        "print(sorted({'jax', 'tensorflow', 'numpy', 'gin', 'orbax', 'seqio'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


LIGHT = ["models.video_mae", "models.backbone", "partitioning", "trainer", "export.released", "optimizers"]


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_do_not_load_the_training_stack(module):
    code = (
        f"import sys; import scaling4d.{module}; "
        "print(sorted({'tensorflow', 'seqio', 'clu', 'gin', 'cv2'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_unknown_command(capsys):
    assert main.main(["trian"]) == 1
    assert "unknown command 'trian'" in capsys.readouterr().err


def test_cpu_is_chosen_where_no_accelerator_is(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(main, "ACCELERATOR_DEVICE_FILES", ("/nonexistent/*",))
    main.choose_platform()
    import os

    assert os.environ["JAX_PLATFORMS"] == "cpu"
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(main, "ACCELERATOR_DEVICE_FILES", ("/dev/null",))
    main.choose_platform()
    assert "JAX_PLATFORMS" not in os.environ
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
