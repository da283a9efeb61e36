"""The strict configuration: what is refused, what wins, and the text that reproduces it."""

import dataclasses
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, Literal

import gin
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling4d import config
from scaling4d.config.syntax import Reference
from scaling4d.errors import UserError


@gin.register(module="toys")
@dataclasses.dataclass(frozen=True)
class ToyModel:
    size: str
    clip: tuple[int, int, int] = (16, 224, 224)
    masking: Literal["random", "tube"] = "random"
    scale: float = 1.0
    depth: int | None = None


@gin.register(module="toys")
class ToyWriter:
    def __init__(self, folder: str, name: str = "x"):
        self.folder, self.name = folder, name


@gin.register(module="toys")
def toy_train(
    *,
    model_dir: str,
    objective: ToyModel,
    total_steps: int,
    rate: float = 1e-3,
    label="none",
    verbose: bool = False,
    writers: Sequence[Callable[[str], ToyWriter]] = (),
    hook: object = object(),  # noqa: B008  a default that gin cannot write
) -> dict[str, Any]:
    return dict(locals())


BASE = """
MODEL_DIR = %gin.REQUIRED
TRAIN_STEPS = 100
SIZE = 'tiny'
RATE = 0.5
LABEL = 3
toy_train.model_dir = %MODEL_DIR
toy_train.total_steps = %TRAIN_STEPS
toy_train.objective = @ToyModel()
toy_train.rate = %RATE
toy_train.label = %LABEL
toy_train.writers = [@ToyWriter]
ToyModel.size = %SIZE
"""


@pytest.fixture
def base(tmp_path) -> str:
    path = tmp_path / "base.gin"
    path.write_text(BASE)
    return str(path)


def refused(gin_file: str, *bindings: str) -> str:
    with pytest.raises(UserError) as caught:
        config.parse([gin_file], ["MODEL_DIR=/runs/a", *bindings])
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_values_reach_the_function(base):
    config.parse([base], ["MODEL_DIR=/runs/a", "RATE=2", "ToyModel.scale=3", "ToyModel.depth=None"])
    bound = gin.get_configurable("toy_train")()
    assert bound["model_dir"] == "/runs/a"
    assert bound["objective"] == ToyModel("tiny", scale=3.0)
    assert type(bound["rate"]) is float and type(bound["objective"].scale) is float
    assert [writer("f").folder for writer in bound["writers"]] == ["f"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/tmp/x", "/tmp/x"),
        ('"/tmp/x"', "/tmp/x"),
        ("'/tmp/x'", "/tmp/x"),
        ("gs://bucket/run-1", "gs://bucket/run-1"),
        ("runs/2026-01", "runs/2026-01"),
        ("7", "7"),
        ("1e5", "1e5"),
        ("07", "07"),
        ("a=b", "a=b"),
        ("run #3", "run #3"),
        ("7#3", "7#3"),
    ],
)
def test_a_bare_string_is_taken_for_a_string_macro(base, text, expected):
    config.parse([base], [f"MODEL_DIR={text}"])
    assert config.value("toy_train.model_dir") == expected


@pytest.mark.parametrize(
    ("binding", "words"),
    [
        ("TRAIN_STEPS=1OO", "--gin.TRAIN_STEPS: toy_train.total_steps (set by 'TRAIN_STEPS') is '1OO', it must be int"),
        ("TRAIN_STEPS=1e3", "is 1000.0, it must be int; write 1000"),
        ("TRAIN_STEPS=True", "is True, it must be int"),
        ("TRAIN_STEPS=None", "is None, it must be int"),
        ("TRAIN_STEPS='100'", "is '100', it must be int"),
        ("MODEL_DIR=None", "is None, it must be str"),
        ("TRAINSTEPS=5", "no binding uses the macro 'TRAINSTEPS'; did you mean 'TRAIN_STEPS'?"),
        ("toy_train.totl_steps=5", "'toy_train' has no parameter 'totl_steps'; did you mean 'total_steps'?"),
        ("toy_trian.total_steps=5", "nothing is registered as 'toy_trian'; did you mean 'toy_train'?"),
        ("toy_train.objective=@ToyModle()", "nothing is registered as 'ToyModle'; did you mean 'ToyModel'?"),
        ("toy_train.objective=@ToyModel", "is @ToyModel, it must be ToyModel; write @ToyModel()"),
        ("toy_train.objective=3", "it must be ToyModel"),
        ("toy_train.writers=@ToyWriter", "it must be Sequence[Callable[[str], ToyWriter]]"),
        ("toy_train.writers=ToyWriter", "it must be Sequence[Callable[[str], ToyWriter]]"),
        ("toy_train.rate=%RATES", "the macro '%RATES' is never set; did you mean 'RATE'?"),
        ("toy_train.verbose=1", "it must be bool"),
        ("toy_train.verbose=yes", "it must be bool"),
        ("ToyModel.masking=tub", "it must be 'random' or 'tube'; did you mean 'tube'?"),
        ("ToyModel.clip=[16,224,224]", "a tuple, written (1, 2)"),
        ("ToyModel.clip=(16,224)", "so 3 values"),
        ("ToyModel.clip=(16,224,2.5)", "it must be int"),
        ("ToyModel.depth=3.0", "it must be int or None"),
        ("LABEL=three", "--gin.LABEL=three is a string, but 'LABEL' is 3 at "),
        ("TRAIN_STEPS=", "--gin.TRAIN_STEPS has no value"),
        ("TRAIN_STEPS", "--gin.TRAIN_STEPS has no value"),
        ('MODEL_DIR="/tmp', "not a gin value"),
        ("toy_train.objective=@ToyModel(", "not a gin value"),
        ("TRAIN-STEPS=4", "not a name"),
        ("toy_train.rate=%gin.REQUIRED", "toy_train.rate is required; set --gin.toy_train.rate=VALUE"),
        ("ToyModel.size=%gin.REQUIRED", "ToyModel.size is required"),
        ("TRAIN_STEPS=%TRAIN_STEPS", "the macro 'TRAIN_STEPS' is made of itself"),
    ],
)
def test_refused_on_the_command_line(base, binding, words):
    assert words in refused(base, binding)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("BATCH = 3", "extra.gin:2: no binding uses the macro 'BATCH'"),
        ("BATCH = 3\nMORE = %BATCH", "no binding uses the macro"),
        ("toy_train.rate = %RAET", "extra.gin:2: the macro '%RAET' is never set; did you mean 'RATE'?"),
        ("toy_train.rate = 'fast'", "extra.gin:2: toy_train.rate is 'fast', it must be float"),
        ("ToyWriter.nam = 'y'", "extra.gin:2: 'ToyWriter' has no parameter 'nam'; did you mean 'name'?"),
        ("NotThere.x = 1", "extra.gin:2: nothing is registered as 'NotThere'"),
        ("NotThere:\n  x = 1", "extra.gin:2: nothing is registered as 'NotThere'"),
        ("ToyWriter:\n  name = 3", "extra.gin:3: ToyWriter.name is 3, it must be str"),
        ("toy_train.rate = ", "extra.gin:2: gin syntax error"),
        ("toy_train.rate 0.5", "extra.gin:2: gin syntax error"),
        ("toy_train.rate = (1,", "extra.gin:"),
        ("toy_train.rate = 0.5 0.6", "extra.gin:2: gin syntax error"),
        ("toy_train.rate = 3 * 4", "extra.gin:2: gin syntax error"),
        ("toy_train.rate = __import__('os').system('true')", "extra.gin:2: gin syntax error"),
        ("import not_a_package.at_all", "extra.gin:2: import not_a_package.at_all failed"),
        ("from __gin__ import dynamic_registration", "extra.gin:2: 'from __gin__ import dynamic_registration' is not"),
        ("include 'bsae.gin'", "extra.gin:2: no gin file 'bsae.gin'; did you mean 'base.gin'?"),
        ("A = %B\nB = [%A]\ntoy_train.label = %A", "is made of itself"),
        ("toy_train.objective = @ToyWriter()", "@ToyWriter() is ToyWriter"),
    ],
)
def test_refused_in_a_file(tmp_path, base, line, words):
    extra = tmp_path / "extra.gin"
    extra.write_text(f"include 'base.gin'\n{line}\n")
    assert words in refused(str(extra))


def test_no_file():
    with pytest.raises(UserError, match="give --gin_file=pretrain/tiny.gin"):
        config.parse([], ["TRAIN_STEPS=5"])


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "a.gin").write_bytes(b"\xff\xfe\x00")
    assert "cannot read gin file" in refused(str(tmp_path / "a.gin"))
    assert "no gin file" in refused(str(tmp_path))


def test_required_macro(base):
    with pytest.raises(UserError, match="MODEL_DIR is required; set --gin.MODEL_DIR=VALUE"):
        config.parse([base])


def test_a_called_name_must_have_all_it_needs(tmp_path):
    path = tmp_path / "a.gin"
    path.write_text("toy_train.objective = @ToyModel()")
    with pytest.raises(UserError, match="ToyModel.size is not set, and toy_train.objective needs it"):
        config.parse([str(path)])
    config.parse([str(path)], ["ToyModel.size=S"])
    with pytest.raises(UserError, match="toy_train.model_dir is not set, and the command needs it"):
        config.parse([str(path)], ["ToyModel.size=S"], roots=["toy_train"])


def test_a_flag_without_effect_is_refused(base):
    assert "overridden wherever 'TRAIN_STEPS' is used" in refused(base, "TRAIN_STEPS=5", "toy_train.total_steps=6")
    config.parse([base], ["MODEL_DIR=/a", "toy_train.total_steps=6"])  # the file's macro may be overridden
    assert config.value("toy_train.total_steps") == 6


def test_later_wins(tmp_path, base):
    later = tmp_path / "later.gin"
    later.write_text("TRAIN_STEPS = 7\n")
    config.parse([base, str(later)], ["MODEL_DIR=/a"])
    assert config.value("toy_train.total_steps") == 7
    config.parse([base, str(later)], ["MODEL_DIR=/a", "TRAIN_STEPS=8", "TRAIN_STEPS=9"])
    assert config.value("toy_train.total_steps") == 9


def test_scopes(base):
    config.parse([base], ["MODEL_DIR=/a", "small/ToyModel.size=S", "toy_train.objective=@small/ToyModel()"])
    assert gin.get_configurable("toy_train")()["objective"].size == "S"
    text = config.resolved_config()
    assert "small/ToyModel.size = 'S'" in text.splitlines()
    config.parse_text(text, "resolved")
    assert config.resolved_config() == text


def test_unknown_names_nothing_calls_are_refused_and_known_ones_are_fine(base):
    config.parse([base], ["MODEL_DIR=/a", "ToyWriter.name=unused_by_this_command"])
    assert "'ToyWriter' has no parameter" in refused(base, "ToyWriter.what=1")


def test_includes_work_from_any_folder(tmp_path, monkeypatch):
    recipes = tmp_path / "recipes"
    (recipes / "sizes").mkdir(parents=True)
    (recipes / "runs").mkdir()
    (recipes / "sizes" / "s.gin").write_text("SIZE = 'S'\n")
    (recipes / "runs" / "common.gin").write_text("ToyModel.size = %SIZE\n")
    (recipes / "runs" / "a.gin").write_text("include 'sizes/s.gin'\ninclude 'common.gin'\n")
    monkeypatch.chdir("/")
    parsed = config.parse(["runs/a.gin"], search_paths=[str(recipes)])
    assert config.value("ToyModel.size") == "S"
    assert [name.rsplit("/", 2)[-1] for name in parsed.files] == ["a.gin", "s.gin", "common.gin"]
    config.parse([str(recipes / "runs" / "a.gin")], search_paths=[str(recipes)])
    monkeypatch.chdir(recipes / "runs")
    config.parse(["a.gin"], search_paths=[".."])
    with pytest.raises(UserError, match="no gin file 'runs/b.gin'; did you mean 'runs/a.gin'"):
        config.parse(["runs/b.gin"], search_paths=[str(recipes)])


def test_include_circle(tmp_path):
    (tmp_path / "a.gin").write_text("include 'b.gin'\n")
    (tmp_path / "b.gin").write_text("include 'a.gin'\n")
    with pytest.raises(UserError, match="include each other in a circle"):
        config.parse([str(tmp_path / "a.gin")])


def test_a_refused_configuration_leaves_the_one_before_in_force(base):
    config.parse([base], ["MODEL_DIR=/a"])
    refused(base, "TRAIN_STEPS=x")
    assert config.value("toy_train.total_steps") == 100
    assert gin.get_configurable("toy_train")()["total_steps"] == 100


def test_resolved_text(base):
    config.parse([base], ["MODEL_DIR=/a", "RATE=1"])
    text = config.resolved_config()
    assert text == textwrap.dedent("""\
        # toy_train
        toy_train.model_dir = '/a'
        toy_train.objective = @ToyModel()
        toy_train.total_steps = 100
        toy_train.rate = 1.0
        toy_train.label = 3
        toy_train.verbose = False
        toy_train.writers = [@ToyWriter]
        # toy_train.hook keeps its default, of type object

        # ToyModel
        ToyModel.size = 'tiny'
        ToyModel.clip = (16, 224, 224)
        ToyModel.masking = 'random'
        ToyModel.scale = 1.0
        ToyModel.depth = None

        # ToyWriter
        ToyWriter.name = 'x'
        """)
    before = gin.get_configurable("toy_train")()
    config.parse_text(text, "config.gin")
    assert config.resolved_config() == text
    after = gin.get_configurable("toy_train")()
    assert {**before, "writers": 0} == {**after, "writers": 0}


def test_the_resolved_text_has_what_was_called_without_being_bound(base):
    @gin.register(module="toys")
    def toy_called_from_python(width=3):
        return width

    config.parse([base], ["MODEL_DIR=/a"])
    assert "toy_called_from_python" not in config.resolved_config()
    gin.get_configurable("toy_called_from_python")()
    assert "toy_called_from_python.width = 3" in config.resolved_config().splitlines()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3)
    | st.lists(inner, max_size=3).map(tuple)
    | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(VALUES)
def test_the_resolved_text_gives_every_value_back(value):
    config.parse_text("toy_train.label = None", "start")
    key = next(iter(config.parse_text("toy_train.label = None", "start").bindings))
    config._in_force[0].bindings[key] = value
    text = config.resolved_config()
    assert config.parse_text(text, "resolved").bindings[key] == value
    assert config.resolved_config() == text


def test_value_of_a_reference_and_a_default(base):
    config.parse([base], ["MODEL_DIR=/a"])
    assert config.value("toy_train.objective") == Reference("ToyModel", True)
    assert config.value("ToyModel.masking") == "random"
    with pytest.raises(UserError, match="did you mean 'masking'"):
        config.value("ToyModel.mask")


def test_flags():
    files = ["--gin_file=a.gin", "--gin_file", "b.gin", "--gin_search_paths=p,q"]
    flags = config.parse_flags([*files, "--gin.X=1", "--dry_run", "--gin.a/B.c='x y'"])
    assert flags == (["a.gin", "b.gin"], ["X=1", "a/B.c='x y'"], ["p", "q"], ["--dry_run"])
    with pytest.raises(UserError, match="--gin_file has no value"):
        config.parse_flags(["--gin_file"])


PLUGIN = '''
import dataclasses

import gin

from scaling4d.observe.metric_writer import MetricWriter


@gin.register
@dataclasses.dataclass(frozen=True)
class PluginObjective:
    weight: float = 1.0


@gin.register
class PluginWriter(MetricWriter):
    def __init__(self, folder):
        self.folder = folder

    def write(self, step, metrics):
        pass

    def truncate(self, step):
        pass
'''


def test_another_package_comes_in_by_an_import_line(tmp_path):
    """In a process of its own: the package is registered by the import line and nothing else."""
    package = tmp_path / "site" / "my_plugin"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "parts.py").write_text(PLUGIN)
    recipe = tmp_path / "mine.gin"
    recipe.write_text(
        "import my_plugin.parts\nrun.objective = @PluginObjective()\nrun.writers = [@PluginWriter]\n"
        "PluginObjective.weight = 2\n"
    )
    program = f"""
import gin
from collections.abc import Callable, Sequence
from scaling4d import config
from scaling4d.observe.metric_writer import MetricWriter

@gin.register
def run(objective: object, writers: Sequence[Callable[[str], MetricWriter]]):
    return objective.weight, writers[0]("folder").folder

config.parse([{str(recipe)!r}])
assert gin.get_configurable("run")() == (2.0, "folder")
text = config.resolved_config()
assert text.startswith("import my_plugin.parts\\n"), text
config.parse_text(text, "resolved")
assert config.resolved_config() == text
"""
    environment = {"PYTHONPATH": f"{tmp_path / 'site'}", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_task_comes_in_by_an_import_line(tmp_path, monkeypatch):
    from scaling4d.data.tensorflow_setup import seqio

    (tmp_path / "my_tasks.py").write_text(
        "import seqio\n"
        "source = seqio.FunctionDataSource(lambda split, shuffle_files, seed=None: None, splits=['train'])\n"
        "seqio.TaskRegistry.add('my_clips', source=source, output_features={}, preprocessors=[])\n"
    )
    (tmp_path / "mine.gin").write_text("import my_tasks\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config.parse([str(tmp_path / "mine.gin")])
    assert seqio.get_mixture_or_task("my_clips").name == "my_clips"
    assert config.resolved_config() == "import my_tasks\n"
