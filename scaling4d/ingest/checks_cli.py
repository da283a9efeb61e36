"""``scaling4d ingest --verify DIR``, ``--stats DIR`` and ``--index DIR``: looks at records that are there.

Responsible for: flags, the progress line and what is printed. Not responsible for: the checks (``verify.py``), the
numbers (``stats.py``), index files (``index_shards.py``) or making data sets of videos (``cli.py``).
"""

import argparse
import contextlib
import pathlib
import time
from collections.abc import Sequence

from scaling4d import exits
from scaling4d.errors import UserError
from scaling4d.status_line import StatusLine, format_duration

_MOST_ROWS = 1000


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scaling4d ingest",
        description="Checks or describes a data set of clips. --verify reads every byte and exits with 1 if anything "
        "is wrong; --stats prints tables and writes a sheet of pictures.",
    )
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--verify", metavar="DIR", help="check the data set in DIR")
    what.add_argument("--stats", metavar="DIR", help="describe the data set in DIR")
    what.add_argument("--index", metavar="DIR", help="make the shards of JPEG clips in DIR a data set")
    add("--decode_all", action="store_true", help="with --verify: decode every clip instead of one in a hundred")
    add("--sheet", metavar="PNG", help="with --stats: where the sheet of clips goes (DIR/sheet.png; none: nowhere)")
    add("--workers", type=int, metavar="N", help="shards looked at at the same time (one a core)")
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code, raises UserError for mistakes of the user."""
    flags = build_parser().parse_args(argv)
    if flags.workers is not None and flags.workers < 1:
        raise UserError(f"--workers {flags.workers}: must be 1 or more")
    for name in ("verify", "stats", "index"):
        check_folder(name, getattr(flags, name))
    if flags.stats is not None:
        return _stats(flags)
    if flags.index is not None:
        return _index(flags)
    return _verify(flags)


def check_folder(name: str, folder: str | None) -> None:
    """Raises UserError for a bucket: ingest and its checks work on folders."""
    if folder is not None and "://" in folder:
        raise UserError(f"--{name} {folder}: must be a folder; copy a data set to or from a bucket with its own tools")


def _verify(flags: argparse.Namespace) -> int:
    from scaling4d.ingest.verify import DECODED_SHARE, verify

    share = 1.0 if flags.decode_all else DECODED_SHARE
    with _progress("verify") as show:
        report = verify(flags.verify, decoded_share=share, workers=flags.workers, progress=show)
    if report.problems:
        print("\n".join(problem_rows(report.problems)))
    found = f"{len(report.problems)} problems" if report.problems else "no problem"
    print(
        f"{flags.verify}: {found} in {report.shards} shards, {report.clips} clips, {report.bytes / 1e9:.3f} GB; "
        f"{report.decoded} clips were decoded"
    )
    for name, clips in report.labels.items():
        print(f"label {name}: in {clips} clips")
    if report.missing:
        print(f"{', '.join(report.missing)}: not there, which is fine, but opening many shards in a bucket is slower")
    return exits.ERROR if report.problems else exits.DONE


def _index(flags: argparse.Namespace) -> int:
    from scaling4d.ingest.index_shards import index_shards
    from scaling4d.ingest.verify import Problem

    with _progress("index") as show:
        manifest, problems = index_shards(flags.index, workers=flags.workers, progress=show)
    if problems:
        print("\n".join(problem_rows([Problem(item.name, None, item.detail) for item in problems])))
    counts = [f"{split.clips:,} {name} clips in {len(split.shards)} shards" for name, split in manifest.splits.items()]
    print(f"{flags.index} holds {', '.join(counts)}; {len(problems)} problems")
    return exits.DONE


@contextlib.contextmanager
def _progress(command: str):
    line = StatusLine()
    began = time.monotonic()

    def show(progress) -> None:
        is_last = progress.shards_done == progress.shards
        line.show(lambda: progress_text(progress, time.monotonic() - began, command), now=is_last)

    try:
        yield show
    finally:
        line.close()


def _stats(flags: argparse.Namespace) -> int:
    from scaling4d.ingest import stats

    print(stats.describe(flags.stats))
    path = pathlib.Path(flags.stats, "sheet.png") if flags.sheet is None else pathlib.Path(flags.sheet)
    if flags.sheet == "none":
        return exits.DONE
    try:
        path.write_bytes(stats.picture(flags.stats))
    except OSError as error:
        raise UserError(f"--sheet {path}: cannot be written: {error.strerror}; name another file, or none") from error
    print(f"\n{path}: evenly spaced clips")
    return exits.DONE


def progress_text(progress, seconds: float, command: str = "verify") -> str:
    """One line; the time left follows from the bytes done in ``seconds``."""
    share = progress.bytes_done / progress.bytes if progress.bytes else 1.0
    left = f"{format_duration(seconds * (1 - share) / share)} left" if share > 0 else "time left unknown"
    if progress.shards_done == progress.shards:
        left = f"done in {format_duration(seconds)}"
    return (
        f"{command}: {progress.shards_done}/{progress.shards} shards, {progress.problems} problems, {share:.0%}, {left}"
    )


def problem_rows(problems) -> list[str]:
    """An aligned table; of very many problems the first thousand."""
    shown = problems[:_MOST_ROWS]
    rows = [("shard", "record", "what")]
    rows += [(item.shard, "-" if item.record is None else str(item.record), item.what) for item in shown]
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    lines = [f"{shard:<{first}}  {record:>{second}}  {what}" for shard, record, what in rows]
    more = len(problems) - len(shown)
    return [*lines, f"and {more} more"] if more else lines
