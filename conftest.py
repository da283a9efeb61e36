"""Test settings that must hold before JAX starts.

Responsible for: tests run on the CPU, split into eight devices, so that sharding is tested without an accelerator (an
ordinary computation still runs on the first of them). Not responsible for: processes that tests start; those inherit
the platform but not the number of devices, which is set in this process only.
"""

import os
import threading
from collections.abc import Callable

os.environ["JAX_PLATFORMS"] = "cpu"

import hypothesis  # noqa: E402
import jax  # noqa: E402  the platform must be named before the import
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)

# A busy machine is no reason to fail: examples have no deadline.
hypothesis.settings.register_profile("project", deadline=None)
hypothesis.settings.load_profile("project")


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What several tests of this process compile is compiled once."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled-here")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture
def begun_threads() -> Callable[[], list[str]]:
    """Names of the threads that have been started since the test began and still run.

    Not a count of all threads: those of an earlier test may end at any time. Nor those that C++ started and Python only
    met (dummies), which libraries come and go with.
    """
    before = set(threading.enumerate())

    def begun() -> list[str]:
        now = set(threading.enumerate()) - before
        return [thread.name for thread in now if not isinstance(thread, threading._DummyThread)]

    return begun
