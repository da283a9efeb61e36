"""The Python in the README and the docs runs as it stands; only the names of weights are put in."""

import pathlib
import re

import jax
import numpy as np
import pytest

from tests import weight_files

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("page", ["README.md", "docs/backbones.md"])
def test_python_on_the_page_runs(page, tmp_path):
    backbone = weight_files.backbone_values()
    alone = weight_files.write_backbone(tmp_path / "alone.npz", backbone)
    depth = weight_files.write_depth(tmp_path / "depth.npz", backbone, weight_files.readout_values())
    code = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL))
    for name, path in (('"RUN"', alone), ('"4ds-dist-b-depth"', depth)):
        code = code.replace(name, repr(str(path)))
    names: dict = {}
    exec(compile(code, page, "exec"), names)
    features = np.asarray(names["features"])
    assert features.shape == (1, 8, 6, 24) and np.isfinite(features).all()
    # The head starts at zero, so the first step moves it alone.
    assert np.abs(names["params"]["head"]).max() > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(names["grads"]))
    if page != "README.md":
        assert names["depth"].shape == (1, 8, 32, 48, 1)
