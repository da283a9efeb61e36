"""A window of steps under JAX's profiler.

Responsible for: beginning and ending the recording between steps, and where it lies:
``MODEL_DIR/profile/plugins/profile/<time>``, which TensorBoard's profile plugin, xprof and Perfetto open. Not
responsible for: looking at it.

The profiler writes on disks alone; of a run in a bucket the recording is uploaded at its end.
"""

import tempfile
from typing import Any

import jax

from scaling4d.run_folder import RunFolder


class Profile:
    """Records the steps ``first`` to ``last`` of a start; a context manager that ends a recording under way.

    Args:
      run: the run folder.
      steps: (first, last), or empty for none. A start that goes on behind ``first`` records what is left.
    """

    def __init__(self, run: RunFolder, steps: tuple[int, ...]):
        self._run = run
        self._first, self._last = steps or (0, 0)
        self._is_on = False
        self._local: tempfile.TemporaryDirectory[str] | None = None

    def begins_or_ends(self, step: int) -> bool:
        """Whether something changes before ``step`` is handed to the device."""
        return self._is_on != (self._first <= step <= self._last)

    def turn(self, step: int) -> None:
        """Begins or ends the recording; call it where ``begins_or_ends``, with no step in flight."""
        if self._is_on:
            self._end()
            return
        if self._run.is_bucket:
            self._local = tempfile.TemporaryDirectory(prefix="scaling4d-profile-")
        jax.profiler.start_trace(self._local.name if self._local else str(self._run.file(_folder())))
        self._is_on = True

    def _end(self) -> None:
        self._is_on = False
        jax.profiler.stop_trace()
        if self._local is not None:
            self._run.take_in(self._local.name, _folder())
            self._local.cleanup()
            self._local = None

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._is_on:
            self._end()


def _folder() -> str:
    """A recording is named after the second and the host: processes of one host would write the same file."""
    return "profile" if jax.process_count() == 1 else f"profile/process-{jax.process_index()}"
