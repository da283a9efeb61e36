"""The one place where data code imports TensorFlow and seqio: quietly, and without accelerators.

Responsible for: ``tf`` and ``seqio``, ready to use. Not responsible for: anything done with them. The import takes some
8 seconds, so only modules that read clips through tf.data import this one.
"""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator

from scaling4d.errors import UserError

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# Printed by TensorFlow 2.21 while it loads, before its own log level counts; on a machine without a GPU for TensorFlow
# (there is none here: the devices are JAX's) all of it is expected.
_NOISE = re.compile(
    rb"absl::InitializeLog|port\.cc|cudart_stub|cuda_platform|cpu_feature_guard|computation_placer|cuda_executor|"
    rb"Unable to register|TensorFlow binary is optimized|To enable the following instructions|TF-TRT"
)


@contextlib.contextmanager
def _without_noise() -> Iterator[None]:
    """Holds back what is written to standard error meanwhile, then writes it without the known noise."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            held.seek(0)
            with contextlib.suppress(OSError):
                os.write(2, b"".join(line for line in held.read().splitlines(True) if not _NOISE.search(line)))


with _without_noise():
    try:
        import seqio
        import tensorflow as tf
    except ModuleNotFoundError as error:
        raise UserError(f"this needs {error.name}: pip install 'scaling4d[train]'") from error
    for _kind in ("GPU", "TPU"):
        if tf.config.get_visible_devices(_kind):
            tf.config.set_visible_devices([], _kind)

__all__ = ["seqio", "tf"]
