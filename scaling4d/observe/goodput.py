"""Where a run's wall time went, from its first start to its last sign of life: ``MODEL_DIR/goodput.jsonl``.

Responsible for: booking every second of every start under one category, the time between starts, and the table of all
that. Not responsible for: deciding what belongs to which category (``train.py`` says when a phase begins) or rates
(``progress.py``).

Every line is the whole account of one start so far, so the last line of a start is all that counts of it. A thread
writes them: what the loop pays is a clock's reading. Between two lines lie ten seconds (a minute in a bucket, where
appending rewrites the object) or half a percent of the start's age, so that a long run's file stays small; when a start
is killed, the time since its last line counts as down.

Inside of a start time is the monotonic clock's; the wall clock only says when a start began. A start that would begin
before the earlier one's last sign (it waited for its lease, or the hosts' clocks differ) begins there instead, so that
the rows add up.
"""

import contextlib
import dataclasses
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from scaling4d.errors import UserError
from scaling4d.run_folder import RunFolder
from scaling4d.status_line import format_duration

NAME = "goodput.jsonl"

Category = Literal["start-up", "restore", "compile", "data wait", "step", "repeated", "save", "eval", "finish"]
CATEGORIES: tuple[str, ...] = get_args(Category)
LOOP = ("data wait", "step", "repeated", "save", "eval")
"""What goes on for as long as there are steps."""
DOWN = "down"
"""From one start's last sign to the next start."""

_PERIOD_S = 10.0
_BUCKET_PERIOD_S = 60.0
_AGE_SHARE = 1 / 200
_IMPORTED_AT = time.monotonic()


@dataclasses.dataclass(frozen=True)
class Account:
    """One start, as its newest line has it.

    Attributes:
      start: 1 for the run's first.
      began: Unix seconds.
      host: of the main process.
      total_steps: the step at which the run was to end.
      first_step: the step that this start went on from; None before its loop.
      step: the newest step that is done; None before its loop.
      ended: ``ok``, or the error that ended it; None while it runs, and of one that was killed.
      seconds: by category.
    """

    start: int
    began: float
    host: str
    total_steps: int
    first_step: int | None
    step: int | None
    ended: str | None
    seconds: dict[str, float]

    @property
    def last_sign(self) -> float:
        """Unix seconds, to the millisecond."""
        return round(self.began + sum(self.seconds.values()), 3)


def parse(text: str) -> list[Account]:
    """The newest account of every start, oldest start first; torn lines are passed over."""
    newest: dict[int, Account] = {}
    for line in text.splitlines():
        try:
            fields = json.loads(line)
            seconds = {category: float(value) for category, value in fields["seconds"].items()}
            account = Account(**{**fields, "seconds": seconds})
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
        newest[account.start] = account
    return [newest[start] for start in sorted(newest)]


def read(run: RunFolder) -> list[Account]:
    """``parse`` of the run's file; empty where there is none."""
    if not run.exists(NAME):
        return []
    return parse(run.read_bytes(NAME).decode(errors="replace"))


def summarize(accounts: Sequence[Account]) -> dict[str, float]:
    """Seconds by category over all starts, ``down`` among them; they add up to last sign minus first start."""
    table = dict.fromkeys((*CATEGORIES, DOWN), 0.0)
    for account in accounts:
        for category, seconds in account.seconds.items():
            table[category] = table.get(category, 0.0) + seconds
    for before, after in zip(accounts, accounts[1:], strict=False):
        table[DOWN] += after.began - before.last_sign
    return table


def format_table(table: Mapping[str, float], starts: int) -> str:
    """Lines of category, time and share, from ``summarize``; categories without any time are left out."""
    total = sum(table.values())
    lines = [f"wall time    {format_duration(total)} in {starts} start{'s' if starts != 1 else ''}"]
    for category, seconds in table.items():
        if seconds >= 0.0005:
            lines.append(f"  {category:10} {format_duration(seconds):>8} {seconds / total:6.1%}")
    return "\n".join(lines)


class GoodputBook:
    """Books the time of one start; a context manager whose end is the start's end.

    One thread turns the pages (``loop_begins``, ``step_done``, ``during``, ``finishing``); all time before
    ``loop_begins`` that is in no phase is start-up, back to the process's own start.

    Args:
      run: where it is written; None writes nothing, for processes other than the main one.
      total_steps: the run's last step.
      clock, wall: monotonic and Unix seconds.
      age_s: how old the process is.
      may_write: asked before each line: a trainer that was frozen and lost its run folder to another start must not
        stretch its account into that start's time.
      say: receives one line when the file cannot be written, which is no reason to end a run.
    """

    def __init__(
        self,
        run: RunFolder | None,
        total_steps: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        age_s: float | None = None,
        may_write: Callable[[], bool] = lambda: True,
        say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    ):
        self._run, self._clock, self._may_write, self._say = run, clock, may_write, say
        self._earlier = read(run) if run else []
        self._done_before = max((account.step or 0 for account in self._earlier), default=0)
        now = wall()
        began = now - (process_age_s() if age_s is None else age_s)
        if self._earlier:
            began = max(began, self._earlier[-1].last_sign)
        self._mark = clock() - max(0.0, now - began)
        self._began_mark = self._mark
        self._account = Account(
            start=self._earlier[-1].start + 1 if self._earlier else 1,
            began=round(began, 3),
            host=socket.gethostname(),
            total_steps=total_steps,
            first_step=None,
            step=None,
            ended=None,
            seconds=dict.fromkeys(CATEGORIES, 0.0),
        )
        self._open: list[Category] = ["start-up"]
        self._mutex = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write_forever, name="goodput", daemon=True)

    def __enter__(self) -> "GoodputBook":
        if self._run:
            self.write()
            self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._run:
            self._stop.set()
            self._thread.join()
            words = str(error).splitlines() if error else []
            self.write("ok" if error is None else f"{type(error).__name__}: {words[0] if words else ''}"[:300])

    @contextlib.contextmanager
    def during(self, category: Category, only_if: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """Books the time of the block, without phases inside of it; with ``only_if()`` false at its end, the time stays
        with what the block interrupted."""
        self._turn(category)
        try:
            yield
        finally:
            mine = only_if()
            with self._mutex:
                self._book(self._open[-1 if mine else -2])
                self._open.pop()

    def loop_begins(self, step: int) -> None:
        """From now on time is that of steps; ``step`` is the one that the state has."""
        with self._mutex:
            self._book(self._open[-1])
            self._account = dataclasses.replace(self._account, first_step=step, step=step)
            self._open[0] = self._kind_of_step(step)

    def step_done(self, step: int) -> None:
        """The device finished a step."""
        with self._mutex:
            self._book(self._open[-1])
            self._account = dataclasses.replace(self._account, step=step)
            self._open[0] = self._kind_of_step(step)

    def finishing(self) -> None:
        """From now on time that is in no phase belongs to the end of the start."""
        with self._mutex:
            self._book(self._open[-1])
            self._open[0] = "finish"

    def accounts(self, ended: str | None = None) -> list[Account]:
        """All starts' up to now, this one's last."""
        with self._mutex:
            seconds = dict(self._account.seconds)
            seconds[self._open[-1]] += self._clock() - self._mark
            account = dataclasses.replace(self._account, ended=ended)
        return [
            *self._earlier,
            dataclasses.replace(account, seconds={name: round(value, 3) for name, value in seconds.items()}),
        ]

    def table(self) -> str:
        """``format_table`` of all starts up to now."""
        accounts = self.accounts()
        return format_table(summarize(accounts), len(accounts))

    def write(self, ended: str | None = None) -> None:
        """Appends this start's account; a folder that does not take it is told of."""
        assert self._run is not None
        if not self._may_write():
            return
        line = json.dumps(dataclasses.asdict(self.accounts(ended)[-1]))
        try:
            self._run.append_lines(NAME, [line])
        except (OSError, UserError) as error:
            self._say(f"{NAME} could not be written: {error}")

    def _write_forever(self) -> None:
        assert self._run is not None
        period_s = _BUCKET_PERIOD_S if self._run.is_bucket else _PERIOD_S
        while not self._stop.wait(max(period_s, (self._clock() - self._began_mark) * _AGE_SHARE)):
            self.write()

    def _turn(self, category: Category) -> None:
        with self._mutex:
            self._book(self._open[-1])
            self._open.append(category)

    def _book(self, category: Category) -> None:
        now = self._clock()
        self._account.seconds[category] += now - self._mark
        self._mark = now

    def _kind_of_step(self, newest: int) -> Category:
        return "repeated" if newest < self._done_before else "step"


def process_age_s() -> float:
    """Seconds since this process began; where the system does not tell, since this module was imported."""
    try:
        with open("/proc/self/stat") as file:
            # Field 22, in clock ticks after boot; the command name, field 2, may hold spaces and brackets.
            ticks = int(file.read().rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, AttributeError):
        return time.monotonic() - _IMPORTED_AT
