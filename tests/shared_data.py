"""Finds the real clips that some tests use; the product ships without them, so such tests skip when they are absent."""

import os
import pathlib

import pytest


def _folder(name: str) -> pathlib.Path:
    root = os.environ.get("SCALING4D_SHARED") or pathlib.Path(__file__).resolve().parents[2] / "shared"
    folder = pathlib.Path(root) / "data" / name
    if not folder.is_dir():
        pytest.skip(f"no real clips: {folder} is not there (set SCALING4D_SHARED to the folder that holds data/{name})")
    return folder


def videos() -> pathlib.Path:
    """The folder of 32 real videos (also broken ones)."""
    return _folder("videos")
