import io

from scaling4d.inference.progress import Progress
from scaling4d.status_line import StatusLine


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def started(sizes, draws=False) -> tuple[Progress, Clock]:
    clock = Clock()
    progress = Progress("features", draws, StatusLine(io.StringIO(), clock=clock), clock)
    progress.expect(sizes)
    return progress, clock


def test_the_time_left_follows_from_stated_frames_and_leaves_compiling_out():
    progress, clock = started([1000])
    progress.begin(1000, 112)
    assert progress.text() == "features: 0/1 videos, 0 frames, time left unknown"
    clock.now = 60  # compiling
    progress.advance(1, 16)
    clock.now = 64
    progress.advance(2, 32)
    assert progress.text() == "features: 0/1 videos, 48 frames, 0.5 windows/s, 8s left"
    clock.now = 72
    progress.advance(4, 64)
    progress.end()
    assert progress.text() == "features: 1/1 videos, 112 frames, 0.5 windows/s"


def test_drawing_is_timed_by_itself():
    progress, clock = started([1000, 1000], draws=True)
    progress.begin(1000, 80)
    progress.advance(1, 16)
    clock.now = 4
    progress.advance(4, 64)
    clock.now = 5
    progress.drew(20)
    # 60 frames of this video to draw at 20 a second, and another 80 to compute at 16 and draw at 20 a second
    assert progress.text() == "features: 0/2 videos, 80 frames, drawing 20/80, 1.0 windows/s, 12s left"
    clock.now = 8
    progress.drew(60)
    progress.end()
    clock.now = 100  # what is neither is not counted
    progress.begin(1000, 80)
    assert progress.text() == "features: 1/2 videos, 80 frames, 1.0 windows/s, 9s left"


def test_videos_to_come_count_by_their_bytes():
    progress, clock = started([1000, 3000])
    progress.begin(1000, 32)
    progress.advance(1, 16)
    clock.now = 1
    progress.advance(1, 16)
    assert progress.text().endswith(", 6s left")
    progress.end()
    progress.begin(3000, 0)  # states no length
    assert progress.text().endswith(", 6s left")
    clock.now = 3
    progress.advance(2, 32)  # in two seconds, as before
    assert progress.text() == "features: 1/2 videos, 64 frames, 1.0 windows/s, 4s left"


def test_an_unknown_length_is_said_to_be_unknown():
    progress, clock = started([1000, 1000])
    progress.begin(1000, 0)
    for clock.now in range(3):
        progress.advance(1, 16)
    assert progress.text().endswith("time left unknown")


def test_videos_that_fail_or_cannot_be_measured_do_no_harm():
    progress, clock = started([-1, 0, 500])
    progress.begin(-1, 0)
    progress.end()
    progress.begin(0, 0)
    progress.end()
    progress.begin(500, 16)
    progress.advance(1, 16)
    clock.now = 1
    progress.advance(1, 16)  # more frames than were stated
    assert progress.text() == "features: 2/3 videos, 32 frames, 1.0 windows/s, 0s left"
