"""When to say that a run waits for clips, and what to change then.

Responsible for: the words, and saying it seldom. Not responsible for: measuring the wait (``progress.py``) or the
settings (``scaling4d.data.clip_data``).
"""

from collections.abc import Mapping

MENTIONED_SHARE = 0.02
FIRST_WINDOWS = 3
"""Not looked at: the first batches are read while everything starts."""
_MUCH_MORE = 2.0


class DataWaitHint:
    """Says which settings to change when devices wait for clips, once, and again when the wait has doubled since.

    Args:
      settings: those of the data that its speed depends on, with their values, by their gin names.
    """

    def __init__(self, settings: Mapping[str, object]):
        self._settings = settings
        self._windows = 0
        self._said = MENTIONED_SHARE / _MUCH_MORE

    def line(self, share: float) -> str | None:
        """What to say after a log window in which devices had nothing to do for ``share`` of the time, for want of
        clips."""
        self._windows += 1
        if self._windows <= FIRST_WINDOWS or share <= self._said * _MUCH_MORE:
            return None
        self._said = share
        values = ", ".join(f"--gin.{name} (now {value})" for name, value in self._settings.items())
        return (
            f'data wait {share:.0%}: the devices wait for clips. What may help: {values}; see "Decoding in '
            'processes" in docs/data.md'
        )
