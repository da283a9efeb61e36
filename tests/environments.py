"""Environments for tests that must not see the checkout, made without the network from what is installed.

Responsible for: a virtual environment that holds chosen distributions of this one, by links, and the project's wheel.
"""

import importlib.metadata
import pathlib
import re
import shutil
import subprocess
import sys
import venv

ROOT = pathlib.Path(__file__).resolve().parents[1]


def locked(name: str) -> list[str]:
    """Names of the distributions in ``locks/<name>.txt`` that are installed here."""
    names = re.findall(r"^([A-Za-z0-9_.-]+)==", (ROOT / "locks" / f"{name}.txt").read_text(), re.MULTILINE)
    installed = {re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower() for d in importlib.metadata.distributions()}
    return [one for one in names if re.sub(r"[-_.]+", "-", one).lower() in installed]


def build_wheel(folder: pathlib.Path) -> pathlib.Path:
    """The project's wheel, built from the checkout."""
    source = folder / "source"  # setuptools leaves a build folder behind, and would pack what an older one holds
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=unwanted)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return next(folder.glob("*.whl"))


def make(folder: pathlib.Path, distributions: list[str], wheel: pathlib.Path) -> pathlib.Path:
    """A new environment in ``folder`` with those distributions and the wheel; returns its interpreter."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site = next(folder.glob("lib/python*/site-packages"))
    for name in distributions:
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            source = pathlib.Path(distribution.locate_file(top))
            if not (site / top).exists():
                (site / top).symlink_to(source)
            elif source.is_dir() and not (site / top).is_symlink():
                link_children(source, site / top)
            elif source.is_dir() and (site / top).resolve() != source.resolve():
                raise AssertionError(f"two distributions hold different {top}")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True, text=True)
    return python


def link_children(source: pathlib.Path, target: pathlib.Path) -> None:
    for child in source.iterdir():
        if not (target / child.name).exists():
            (target / child.name).symlink_to(child)
