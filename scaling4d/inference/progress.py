"""How far the work on videos is, for a person who watches it.

Responsible for: the text of the line and the time left. Not responsible for: how it is shown (``status_line.py``).

The time left follows from the frames that files state. A file that states none, and those not looked at yet, count by
their bytes, at as many frames a byte as the videos so far had.
"""

import time
from collections.abc import Callable, Sequence

from scaling4d.status_line import StatusLine, format_duration


class Progress:
    """Counts what is done and shows it.

    Args:
      command: begins the line.
      line, clock: as in ``StatusLine``.
    """

    def __init__(self, command: str, line: StatusLine | None = None, clock: Callable[[], float] = time.monotonic):
        self._command = command
        self._line, self._clock = line or StatusLine(), clock
        self._videos = self._done = 0
        self._bytes_left = self._bytes_done = 0
        self._frames_ended = 0  # of videos that are over
        self._bytes = self._expected = self._frames = 0  # of the video now worked on
        self._windows = 0
        self._drawing = ""
        self._began: float | None = None
        self._before = (0, 0)  # windows and frames that were done then

    def expect(self, sizes: Sequence[int]) -> None:
        """So many videos are to come, of so many bytes each."""
        self._videos, self._bytes_left = len(sizes), sum(max(size, 0) for size in sizes)

    def begin(self, size: int, expected_frames: int) -> None:
        """A video of ``size`` bytes comes; it states so many frames, 0 for none."""
        self._bytes, self._expected, self._frames = max(size, 0), expected_frames, 0
        self._bytes_left -= self._bytes
        self._line.show(self.text)

    def advance(self, windows: int, frames: int) -> None:
        """So many windows went through the model, with so many frames."""
        self._windows += windows
        self._frames += frames
        if self._began is None:  # compiling is over; only what comes after tells how fast this is
            self._began, self._before = self._clock(), (self._windows, self._frames)
        self._line.show(self.text)

    def drawing(self, frames: int) -> None:
        """The pictures of so many frames of the video are drawn."""
        self._drawing = f", drawing {frames}/{self._frames}"
        self._line.show(self.text)

    def end(self) -> None:
        """The video is over, done or not."""
        self._done += 1
        self._bytes_done += self._bytes
        self._frames_ended += self._frames
        self._frames = self._expected = self._bytes = 0
        self._drawing = ""
        self._line.show(self.text, now=self._done == self._videos)

    def close(self) -> None:
        self._line.close()

    def text(self) -> str:
        windows, left = self._windows_a_second(), self._seconds_left()
        rate = f", {windows:.1f} windows/s" if windows else ""
        left_text = f", {format_duration(left)} left" if left is not None else ", time left unknown"
        if self._done == self._videos:
            left_text = ""
        frames = self._frames_ended + self._frames
        return f"{self._command}: {self._done}/{self._videos} videos, {frames} frames{self._drawing}{rate}{left_text}"

    def _since(self) -> float:
        return self._clock() - self._began if self._began is not None else 0.0

    def _windows_a_second(self) -> float:
        seconds = self._since()
        return (self._windows - self._before[0]) / seconds if seconds > 0 else 0.0

    def _seconds_left(self) -> float | None:
        seconds = self._since()
        done = self._frames_ended + self._frames - self._before[1]
        expected = self._frames_left()
        return expected * seconds / done if seconds > 0 and done > 0 and expected is not None else None

    def _frames_left(self) -> float | None:
        here = float(self._expected)
        known_bytes = self._bytes_done + (self._bytes if here else 0)
        known_frames = self._frames_ended + here
        frames_a_byte = known_frames / known_bytes if known_bytes else 0.0
        here = here or self._bytes * frames_a_byte
        if (self._bytes and not here) or (self._bytes_left and not frames_a_byte):
            return None
        return max(here - self._frames, 0.0) + self._bytes_left * frames_a_byte
