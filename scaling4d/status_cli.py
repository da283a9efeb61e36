"""``scaling4d status``: how a run stands, from its folder alone; and which of its checkpoints stay for good.

Responsible for: flags, and what of a run folder is told, as text and as JSON. Not responsible for: the files it reads
(``observe/json_lines.py``, ``observe/goodput.py``, ``lease.py``, ``checkpoint_marks.py``); it writes none but pins.
Imports neither JAX nor TensorFlow, so that it answers at once, also where no run could.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator, Sequence
from typing import IO, Any

from etils import epath

from scaling4d import checkpoint_marks, exits, model_json
from scaling4d.errors import UserError
from scaling4d.lease import Holder, died_here, this_process
from scaling4d.observe import goodput
from scaling4d.observe.progress import format_number
from scaling4d.run_folder import RunFolder
from scaling4d.status_line import format_duration

METRICS = "train/metrics.jsonl"
_TAIL_BYTES = 1 << 20
_BEATS_OF_LIFE = 6
"""A heartbeat on another machine counts as living for so many of its periods, as a start that waits for it does."""
_LISTED = 10
_EXPLAINED = 3


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scaling4d status",
        description="Tells how a run stands: whether it runs, its step, losses, checkpoints, problems, and where its "
        "time went. The run is only read: it may be training, here or elsewhere.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model_dir", metavar="MODEL_DIR", help="a run folder, also in a bucket")
    add("--json", action="store_true", help="the same as JSON")
    marks = parser.add_mutually_exclusive_group()
    marks.add_argument("--pin", type=int, metavar="STEP", help="keep the checkpoint of this step for good")
    marks.add_argument("--unpin", type=int, metavar="STEP", help="let the trainer delete it again when it is old")
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code, raises UserError for mistakes of the user."""
    flags = build_parser().parse_args(list(argv))
    run = RunFolder(flags.model_dir)
    if not run.exists():
        raise UserError(f"there is no run folder {run}: give the --model_dir of a run")
    if flags.pin is not None:
        checkpoint_marks.pin(run, flags.pin)
        print(f"checkpoint {flags.pin} stays")
        if checkpoint_marks.being_saved(run):
            print("a save is under way; if it is to delete this one, the next status says that it is gone")
    elif flags.unpin is not None:
        checkpoint_marks.unpin(run, flags.unpin)
        print(f"checkpoint {flags.unpin} is deleted when it is old")
    else:
        status = look(run)
        print(json.dumps(dataclasses.asdict(status), indent=2) if flags.json else describe(status))
    return exits.DONE


@dataclasses.dataclass(frozen=True)
class RunStatus:
    """How a run stands; None where the folder does not say. Losses that are no numbers are text, as in the metrics.

    Attributes:
      state: ``running``; ``done``; ``stopped``, ``failed`` or ``killed`` (as its last start ended); ``never started``.
      trainer: host, process id and, where it is known, seconds since the last heartbeat of the trainer that runs.
      model: what ``model.json`` says.
      step, total_steps: the newest step that is done, and the run's last one.
      loss, held_out, unexplained: value and ``step`` of the newest; the last one as in the progress line.
      clips_per_s: at the newest log point.
      seconds_left: at the pace of this start, with all that it waits for.
      checkpoints, pinned, bad: steps.
      skipped: clips by reason, since the start of the newest start.
      problems: lines.
      starts: how often the run was started.
      goodput: seconds by category.
    """

    model_dir: str
    state: str
    trainer: dict[str, Any] | None
    model: dict[str, Any] | None
    step: int
    total_steps: int | None
    loss: dict[str, Any] | None
    held_out: dict[str, Any] | None
    unexplained: dict[str, Any] | None
    clips_per_s: float | None
    seconds_left: float | None
    checkpoints: list[int]
    pinned: list[int]
    bad: list[int]
    skipped: dict[str, int]
    problems: list[str]
    starts: int
    goodput: dict[str, float]


def look(run: RunFolder) -> RunStatus:
    """Reads a run folder's status."""
    accounts = goodput.read(run)
    newest = accounts[-1] if accounts else None
    trainer = running_trainer(run)
    done = run.read_text("DONE").strip() if run.exists("DONE") else ""
    checkpoints = checkpoint_marks.saved(run)
    if newest and newest.step is not None:
        step = newest.step
    else:
        step = int(done) if done.isdecimal() else max(checkpoints, default=0)
    values = newest_values(run)
    speed = values.get("speed/clips_per_s")
    return RunStatus(
        model_dir=str(run),
        state=_state(run, newest, is_running=trainer is not None, is_done=bool(done)),
        trainer=trainer,
        model=model_json.read(run) if run.exists(model_json.NAME) else None,
        step=step,
        total_steps=newest.total_steps if newest else None,
        loss=values.get("train/loss"),
        held_out=values.get("eval/loss"),
        unexplained=values.get("eval/fvu"),
        clips_per_s=speed["value"] if speed else None,
        seconds_left=_seconds_left(newest) if trainer and newest else None,
        checkpoints=checkpoints,
        pinned=sorted(checkpoint_marks.pinned(run)),
        bad=sorted(checkpoint_marks.bad(run)),
        skipped={
            reason: count
            for reason, count in _counts(values, "data/").items()
            if reason.startswith("bad_") or reason == "blocked"
        },
        problems=_problems(run, accounts, values, checkpoints, is_running=trainer is not None),
        starts=len(accounts),
        goodput=goodput.summarize(accounts),
    )


def running_trainer(run: RunFolder) -> dict[str, Any] | None:
    """``host``, ``pid`` and ``heartbeat_age_s`` of the trainer that holds the lease and lives; None where none does.

    On this machine the system knows; of others the heartbeat's age decides, by the clocks of this machine and of the
    disk, so that it is told.
    """
    numbers = [int(name[6:-5]) for name in run.glob("lease/*.json") if name[6:-5].isdecimal()]
    if not numbers:
        return None
    name = f"lease/{max(numbers)}.json"
    try:
        holder = Holder(**json.loads(run.read_text(name)))
        changed = run.file(name).stat().mtime if run.is_bucket else os.stat(run.file(name)).st_mtime
    except (FileNotFoundError, ValueError, TypeError):
        return None  # it was released between the two looks, or is none of ours
    age_s = max(0.0, round(time.time() - changed, 1)) if changed else None
    here = this_process(0)
    is_here = holder.boot_id and (holder.boot_id, holder.pid_namespace) == (here.boot_id, here.pid_namespace)
    if died_here(holder):
        return None
    if not is_here and age_s is not None and age_s > _BEATS_OF_LIFE * holder.heartbeat_s:
        return None
    return {"host": holder.host, "pid": holder.pid, "heartbeat_age_s": age_s}


def newest_values(run: RunFolder) -> dict[str, dict[str, Any]]:
    """``value`` and ``step`` of the newest of each metric; reads as much of the end as it takes to find both losses."""
    if not run.exists(METRICS):
        return {}
    values: dict[str, dict[str, Any]] = {}
    with _reading(run.file(METRICS)) as file:
        size = file.seek(0, os.SEEK_END)
        length = min(size, _TAIL_BYTES)
        while True:
            file.seek(size - length)
            lines = file.read(length).splitlines()
            for line in reversed(lines):
                try:
                    fields = json.loads(line)
                    step = int(fields["step"])
                except (ValueError, TypeError, KeyError):
                    continue  # the end of a line that began before the tail, or a torn one
                for name, value in fields.items():
                    values.setdefault(name, {"value": value, "step": step})
            if length == size or {"train/loss", "eval/loss"} <= set(values):
                return values
            length = min(size, 16 * length)


@contextlib.contextmanager
def _reading(path: epath.Path) -> Iterator[IO[bytes]]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def describe(status: RunStatus) -> str:
    """The text of the command."""
    lines = [f"{status.model_dir}: {_headline(status)}"]

    def add(title: str, *texts: str | None) -> None:
        told = [text for text in texts if text]
        if told:
            lines.append(f"{title:12} {', '.join(told)}")

    if status.model:
        add("model", f"{status.model.get('size')}", f"{status.model.get('parameters', 0):,} parameters")
    of = f" of {status.total_steps}" if status.total_steps else ""
    share = f" ({status.step / status.total_steps:.0%})" if status.total_steps else ""
    left = None if status.seconds_left is None else f"{format_duration(status.seconds_left)} left"
    if status.state != "never started":
        add("step", f"{status.step}{of}{share}", left)
    add("loss", _at_step(status.loss))
    ratio = f"{float(status.unexplained['value']):.2f} of mean color" if status.unexplained else None
    add("held-out", _at_step(status.held_out), ratio)
    add("speed", f"{format_number(float(status.clips_per_s))} clips/s" if status.clips_per_s is not None else None)
    add(
        "checkpoints",
        _listed(status.checkpoints),
        f"pinned {_listed(status.pinned)}" if status.pinned else None,
        f"bad {_listed(status.bad)}" if status.bad else None,
    )
    add("skipped", *(f"{count:,} clips {name}" for name, count in status.skipped.items()))
    lines += [f"problem      {problem}" for problem in status.problems]
    if status.starts:
        lines += ["", goodput.format_table(status.goodput, status.starts)]
    return "\n".join(lines)


def _headline(status: RunStatus) -> str:
    if not status.trainer:
        return status.state
    age_s = status.trainer["heartbeat_age_s"]
    age = "heartbeat of unknown age" if age_s is None else f"heartbeat {format_duration(age_s)} ago"
    return f"running on {status.trainer['host']} (process {status.trainer['pid']}), {age}"


def _state(run: RunFolder, newest: goodput.Account | None, *, is_running: bool, is_done: bool) -> str:
    if is_running or is_done:
        return "running" if is_running else "done"
    if newest is None:
        return "stopped" if run.exists("config.gin") else "never started"
    return {"ok": "stopped", None: "killed"}.get(newest.ended, "failed")


def _seconds_left(account: goodput.Account) -> float | None:
    if account.step is None or account.first_step is None or account.step == account.first_step:
        return None
    spent = sum(account.seconds[category] for category in goodput.LOOP)
    return (account.total_steps - account.step) * spent / (account.step - account.first_step)


def _problems(
    run: RunFolder, accounts: list[goodput.Account], values: dict, checkpoints: list[int], *, is_running: bool
) -> list[str]:
    """What went wrong, oldest kind of news first."""
    ended = [account.ended for account in (accounts[:-1] if is_running else accounts)]
    problems = []
    if killed := ended.count(None):
        problems.append(f"{killed} of {len(accounts)} starts ended without a word: killed, or the machine went")
    if ended and ended[-1] not in ("ok", None):
        problems.append(f"the last start that ended: {ended[-1]}")
    for step in sorted(checkpoint_marks.bad(run))[-_EXPLAINED:]:
        problems.append(f"checkpoint {step} is bad: {checkpoint_marks.why_bad(run, step)}")
    if gone := sorted(checkpoint_marks.pinned(run) - set(checkpoints)):
        problems.append(f"pinned, but gone: {_listed(gone)}")
    if refused := _counts(values, "guard/"):
        problems.append("steps refused: " + ", ".join(f"{count} {name}" for name, count in refused.items()))
    if reports := run.glob("watchdog/*.txt"):
        newest = max(reports, key=lambda name: name.rpartition("-")[2])
        more = f" (and {len(reports) - 1} more)" if len(reports) > 1 else ""
        problems.append(f"{run.read_text(newest).splitlines()[0]}: {newest}{more}")
    return problems


def _counts(values: dict[str, dict[str, Any]], prefix: str) -> dict[str, int]:
    """Metrics that are counts, by name without the prefix; zeros are left out."""
    found = {name.removeprefix(prefix): entry["value"] for name, entry in values.items() if name.startswith(prefix)}
    return {name: int(count) for name, count in found.items() if isinstance(count, float | int) and count}


def _at_step(entry: dict[str, Any] | None) -> str | None:
    return f"{format_number(float(entry['value']))} at step {entry['step']}" if entry else None


def _listed(steps: list[int]) -> str:
    earlier = f"({len(steps) - _LISTED} earlier) " if len(steps) > _LISTED else ""
    return earlier + " ".join(map(str, steps[-_LISTED:]))
