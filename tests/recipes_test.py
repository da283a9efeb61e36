"""Every shipped gin file is used, parses, and describes a run of the size it names."""

import importlib.resources

import pytest

from scaling4d import config, configurables

FOLDER = importlib.resources.files("scaling4d.gin_configs")
RECIPES = sorted(f"pretrain/{file.name}" for file in (FOLDER / "pretrain").iterdir() if file.name.endswith(".gin"))
SIZES = sorted(f"sizes/{file.name}" for file in (FOLDER / "sizes").iterdir() if file.name.endswith(".gin"))
WHERE = ["MODEL_DIR='/run'", "DATA_DIR='/clips'"]

GOLDEN_PARAMETERS = {  # with the coarse tokens and the pixel projection, at the recipe's clip
    "sizes/tiny.gin": 1_857_920,
    "sizes/ti.gin": 6_677_952,
    "sizes/s.gin": 23_969_664,
    "sizes/b.gin": 90_403_584,
    "sizes/l.gin": 309_440_512,
    "sizes/h.gin": 638_591_232,
    "sizes/g.gin": 1_852_949_120,
    "sizes/e.gin": 3_816_377_088,
    "sizes/j.gin": 21_507_808_256,
}


@pytest.fixture(autouse=True)
def names():
    configurables.register()


def parameters() -> int:
    import jax
    import numpy as np

    objective = configurables.build_run().objective
    shapes = jax.eval_shape(objective.init, jax.random.key(0))
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("size", SIZES)
def test_parameter_count_of_every_size(size):
    config.parse(["pretrain/4ds.gin", size], WHERE, roots=["train"])
    assert parameters() == GOLDEN_PARAMETERS[size]


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r not in ("pretrain/base.gin", "pretrain/4ds.gin")])
def test_every_recipe_describes_a_run(recipe):
    config.parse([recipe], WHERE, roots=["train"])
    run = configurables.build_run()
    assert run.total_steps > run.optimizer.schedule.warmup_steps
    assert config.parse_text(config.resolved_config(), "resolved", roots=["train"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_begins_with_what_it_is_for(recipe):
    lines = (FOLDER / recipe).read_text().splitlines()
    assert lines[0].startswith("# ")
    assert recipe == "pretrain/base.gin" or any("scaling4d train" in line for line in lines[:12])
