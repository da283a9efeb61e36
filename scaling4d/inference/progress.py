"""How far the work on videos is, for a person who watches it.

Responsible for: the text of the line and the time left. Not responsible for: how it is shown (``status_line.py``).

The time left follows from the frames that files state. A file that states none, and those not looked at yet, count by
their bytes, at as many frames a byte as the videos so far had. The model and the drawing of pictures are timed apart;
the first batch, with which the model is compiled, is left out.
"""

import time
from collections.abc import Callable, Sequence

from scaling4d.status_line import StatusLine, format_duration


class Progress:
    """Counts what is done and shows it.

    Args:
      command: begins the line.
      draws: whether every frame is drawn after it went through the model.
      line, clock: as in ``StatusLine``.
    """

    def __init__(
        self,
        command: str,
        draws: bool = False,
        line: StatusLine | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._command, self._draws = command, draws
        self._line, self._clock = line or StatusLine(), clock
        self._videos = self._done = 0
        self._bytes_left = self._bytes_done = 0
        self._frames_ended = 0  # of videos that are over
        self._bytes = self._expected = self._frames = self._drawn = 0  # of the video now worked on
        self._mark = clock()
        self._compiled = False
        self._model_s = self._drawing_s = 0.0
        self._timed_windows = self._timed_frames = self._timed_drawn = 0

    def expect(self, sizes: Sequence[int]) -> None:
        """So many videos are to come, of so many bytes each."""
        self._videos, self._bytes_left = len(sizes), sum(max(size, 0) for size in sizes)

    def begin(self, size: int, expected_frames: int) -> None:
        """A video of ``size`` bytes comes; it states so many frames, 0 for none."""
        self._bytes, self._expected, self._frames, self._drawn = max(size, 0), expected_frames, 0, 0
        self._bytes_left -= self._bytes
        self._lap()
        self._line.show(self.text)

    def advance(self, windows: int, frames: int) -> None:
        """So many more windows went through the model, with so many frames."""
        self._frames += frames
        seconds = self._lap()
        if self._compiled:
            self._model_s += seconds
            self._timed_windows += windows
            self._timed_frames += frames
        self._compiled = True
        self._line.show(self.text)

    def drew(self, frames: int) -> None:
        """So many more frames of the video are drawn."""
        self._drawn += frames
        self._drawing_s += self._lap()
        self._timed_drawn += frames
        self._line.show(self.text)

    def end(self) -> None:
        """The video is over, done or not."""
        self._done += 1
        self._bytes_done += self._bytes
        self._frames_ended += self._frames
        self._bytes = self._expected = self._frames = self._drawn = 0
        self._line.show(self.text, now=self._done == self._videos)

    def close(self) -> None:
        self._line.close()

    def text(self) -> str:
        parts = [f"{self._done}/{self._videos} videos", f"{self._frames_ended + self._frames} frames"]
        if self._drawn:
            parts.append(f"drawing {self._drawn}/{self._frames}")
        if self._model_s > 0:
            parts.append(f"{self._timed_windows / self._model_s:.1f} windows/s")
        if self._done < self._videos:
            seconds = self._seconds_left()
            parts.append("time left unknown" if seconds is None else f"{format_duration(seconds)} left")
        return f"{self._command}: {', '.join(parts)}"

    def _lap(self) -> float:
        """Seconds since it was last asked."""
        before, self._mark = self._mark, self._clock()
        return self._mark - before

    def _seconds_left(self) -> float | None:
        frames = self._frames_left()
        if frames is None or not self._timed_frames:
            return None
        seconds = frames * self._model_s / self._timed_frames
        if self._draws and self._timed_drawn:
            seconds += (frames + self._frames - self._drawn) * self._drawing_s / self._timed_drawn
        return seconds

    def _frames_left(self) -> float | None:
        """Frames that have not gone through the model; None where that cannot be told."""
        here = float(self._expected)
        known_bytes = self._bytes_done + (self._bytes if here else 0)
        known_frames = self._frames_ended + here
        frames_a_byte = known_frames / known_bytes if known_bytes else 0.0
        if self._drawn:  # all of this video has
            here = float(self._frames)
        here = here or self._bytes * frames_a_byte
        if (self._bytes and not here) or (self._bytes_left and not frames_a_byte):
            return None
        return max(here - self._frames, 0.0) + self._bytes_left * frames_a_byte
