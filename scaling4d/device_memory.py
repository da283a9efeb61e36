"""What a step needs of a device's memory, and what is said when there is not enough.

Responsible for: the one line that a run out of device memory ends with. Not responsible for: how a step is compiled and
run (``trainer.py``, ``loop.py``).
"""

import contextlib
from collections.abc import Iterator

import jax

from scaling4d.errors import UserError


@contextlib.contextmanager
def device_memory_errors(batch_size: int, microbatches: int) -> Iterator[None]:
    """Turns a device out of memory into one line; other errors pass."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first_line = str(error).strip().splitlines()[0]
        raise UserError(
            f"out of device memory with batch {batch_size} in {microbatches} microbatch(es) ({first_line}): "
            "lower --gin.BATCH_SIZE, raise --gin.MICROBATCHES, use --gin.REMAT=full, or more devices on 'data'"
        ) from None
