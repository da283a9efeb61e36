"""``scaling4d ingest``: video files into clip records.

Responsible for: flags, the progress line and what is printed. Not responsible for: the work (``run.py``). ``--help``
loads nothing heavy, so the heavy imports are inside ``main``.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields

from scaling4d import exits
from scaling4d.errors import UserError
from scaling4d.ingest import checks_cli
from scaling4d.ingest.settings import IngestSettings


def _number_or_none(kind):
    def parse(text: str):
        return None if text.lower() == "none" else kind(text)

    parse.__name__ = f"{kind.__name__} or none"
    return parse


def _part(text: str) -> tuple[int, int]:
    index, count = text.split("/")
    return int(index), int(count)


_part.__name__ = "part, such as 0/8"  # what argparse calls a wrong value


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scaling4d ingest",
        description="Turns video files (mp4, m4v, webm, mkv, avi, mov) into a data set of short H.264 clips for "
        "training. A file that cannot be used is skipped, listed at the end and in OUTPUT/errors.tsv.",
        epilog="For records that are there, each with --help for its flags: scaling4d ingest --verify DIR checks every "
        "byte of a data set, --stats DIR describes it, --index DIR makes TFRecord shards of JPEG clips a data set.",
    )
    default = IngestSettings()
    add = parser.add_argument
    add(
        "--input",
        required=True,
        metavar="DIR_OR_GLOB",
        help="a folder (searched recursively), a glob pattern or one file",
    )
    add("--output", required=True, metavar="DIR", help="the folder of the data set; made if missing")
    add(
        "--holdout",
        type=float,
        default=default.holdout,
        metavar="SHARE",
        help="share of the source videos held out for validation, at least one of two or more (%(default)s; 0: none)",
    )
    add(
        "--short_side",
        type=int,
        default=default.short_side,
        metavar="PIXELS",
        help="shorter side of the clips; smaller videos keep their size (%(default)s)",
    )
    add("--frames", type=int, default=default.frames, help="most frames of a clip (%(default)s)")
    add(
        "--min_frames",
        type=int,
        default=default.min_frames,
        help="shorter leftovers of a scene are dropped (%(default)s)",
    )
    add(
        "--clips_per_file",
        type=_number_or_none(int),
        default=default.clips_per_file,
        metavar="N",
        help="take only the first so many clips of a file, or none to take all (%(default)s)",
    )
    add(
        "--fps",
        type=_number_or_none(float),
        default=default.fps,
        metavar="RATE",
        help="frames a second, or none to keep each video's own (%(default)s)",
    )
    add("--crf", type=int, default=default.crf, help="x264 quality, 0 best to 51 worst (%(default)s)")
    add("--gop", type=int, default=default.gop, help="most frames from one keyframe to the next (%(default)s)")
    add(
        "--cut_threshold",
        type=_number_or_none(float),
        default=default.cut_threshold,
        metavar="LEVELS",
        help="mean change of a grey thumbnail (0 to 255) that ends a scene, or none (%(default)s)",
    )
    add(
        "--shard_clips", type=int, default=default.shard_clips, metavar="CLIPS", help="clips a shard file (%(default)s)"
    )
    add(
        "--in_place",
        action="store_true",
        help="write where the clips are in the videos instead of the clips: small, slow to train on, needs the videos",
    )
    add(
        "--labels",
        metavar="TSV",
        help="a table separated by tabs: a column 'source' (a video's path below --input) and columns of labels, which "
        "become fields of its records",
    )
    add("--workers", type=int, default=None, metavar="N", help="videos worked on at the same time (one a core)")
    add(
        "--file_seconds", type=int, default=1800, metavar="SECONDS", help="longest time spent on one file (%(default)s)"
    )
    add("--file_memory_gb", type=float, default=3.0, metavar="GB", help="most memory used for one file (%(default)s)")
    add("--overwrite", action="store_true", help="replace a data set, or unfinished work, that is in OUTPUT")
    add(
        "--shard",
        type=_part,
        metavar="I/N",
        help="encode only part I (0 to N - 1) of the videos: one of N commands, on any machines that see OUTPUT",
    )
    add("--merge", action="store_true", help="the last command after all parts: makes the data set, encodes nothing")
    add(
        "--beam",
        type=int,
        metavar="N",
        help="encode in N parts on Apache Beam, then make the data set; Beam's options follow after a --, such as "
        "-- --runner=FlinkRunner",
    )
    add("--dry_run", action="store_true", help="look at a few files, print what it will take, and write nothing")
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code, raises UserError for mistakes of the user."""
    if any(argument.split("=")[0] in ("--verify", "--stats", "--index") for argument in argv):
        return checks_cli.main(argv)
    own = argv[: argv.index("--")] if "--" in argv else argv
    beam_options = argv[len(own) + 1 :]
    flags = build_parser().parse_args(own)
    names = {field.name for field in fields(IngestSettings)} - {"labels"}
    settings = IngestSettings(**{name: getattr(flags, name) for name in names})
    if flags.workers is not None and flags.workers < 1:
        raise UserError(f"--workers {flags.workers}: must be 1 or more")
    if flags.file_seconds < 1 or flags.file_memory_gb < 0.25:
        raise UserError("--file_seconds must be 1 or more and --file_memory_gb 0.25 or more")
    checks_cli.check_folder("output", flags.output)
    if flags.shard and flags.merge:
        raise UserError("--shard and --merge exclude each other: --merge comes last, once, when all parts are done")
    if flags.beam is not None and (flags.beam < 1 or flags.shard or flags.merge or flags.dry_run):
        raise UserError(f"--beam {flags.beam}: must be 1 or more, and without --shard, --merge and --dry_run")
    if beam_options and flags.beam is None:
        raise UserError(f"-- {' '.join(beam_options)}: options of Beam need --beam N")
    try:
        from scaling4d.ingest import run
        from scaling4d.ingest.labels import Labels, read_labels
        from scaling4d.ingest.media import MediaLimits
        from scaling4d.ingest.progress import ProgressLine
        from scaling4d.ingest.sandbox import Limits
        from scaling4d.ingest.work import Part
    except ModuleNotFoundError as error:
        raise UserError(f"ingest needs {error.name}: pip install 'scaling4d[train]'") from error

    limits = MediaLimits(process=Limits(memory_bytes=int(flags.file_memory_gb * 2**30), seconds=flags.file_seconds))
    progress = ProgressLine()
    ingest = run.Ingest(
        flags.input,
        flags.output,
        settings,
        limits=limits,
        workers=flags.workers,
        overwrite=flags.overwrite,
        labels=read_labels(flags.labels) if flags.labels is not None else Labels(),
        progress=progress,
    )
    if flags.dry_run:
        return _dry_run(ingest, flags)
    try:
        if flags.beam is not None:
            from scaling4d.ingest.beam import encode_on_beam

            encode_on_beam(ingest, flags.labels, flags.beam, beam_options)
        summary = ingest.run_part(Part(*flags.shard)) if flags.shard else ingest.run(only_join=flags.merge)
    except run.NothingUsable as error:
        progress.close()
        _print_skipped(error.skipped)
        raise
    except KeyboardInterrupt:
        progress.close()
        print("stopped; the same command goes on from here", file=sys.stderr)
        raise
    finally:
        progress.close()
    _print_skipped(summary.skipped)
    print(_part_text(summary, flags) if flags.shard else _summary_text(summary, flags.output))
    return exits.DONE


def _dry_run(ingest, flags: argparse.Namespace) -> int:
    from scaling4d.data.cores import usable_cores
    from scaling4d.ingest import estimate
    from scaling4d.status_line import StatusLine

    standing = ingest.look()
    if standing.complete:
        print(_summary_text(standing.complete, flags.output))
        return exits.DONE
    lines = [estimate.done_text(standing.sources, standing.done)] if standing.done else []
    left = [source for source in standing.sources if source.name not in standing.done]
    if left:
        workers = flags.workers or usable_cores()
        line = StatusLine()
        try:
            found = estimate.estimate(
                left,
                ingest.settings,
                ingest.limits,
                workers,
                lambda count, of: line.show(lambda: f"dry run: looked at {count} of {of} files", now=count == of),
            )
        finally:
            line.close()
        lines += estimate.text(found, ingest.settings, workers, ingest.folder)
    else:
        lines.append("  left    the clips are to be joined to shards")
    print("\n".join([*lines, "nothing was written"]))
    return exits.DONE


def _part_text(summary, flags: argparse.Namespace) -> str:
    part = f"part {flags.shard[0]}/{flags.shard[1]} of {flags.output} is done ({summary.files} files)"
    if summary.files_left:
        return f"{part}; {summary.files_left} files are left, of other parts or to be tried again"
    return f"{part}; so are the others: give the command once more with --merge instead of --shard"


def _print_skipped(skipped) -> None:
    from scaling4d.ingest.sources import printable

    if not skipped:
        return
    print(f"{len(skipped)} files were skipped:", file=sys.stderr)
    rows = [(printable(item.name), item.reason, printable(item.detail)) for item in skipped]
    name_width, reason_width = (max(len(row[column]) for row in rows) for column in (0, 1))
    for name, reason, detail in rows:
        print(f"  {name:<{name_width}}  {reason:<{reason_width}}  {detail}", file=sys.stderr)


def _summary_text(summary, output: str) -> str:
    parts = []
    for name, split in summary.manifest.splits.items():
        size = sum(shard.bytes for shard in split.shards)
        parts.append(f"{split.clips} {name} clips from {split.sources} videos ({size / 1e6:.1f} MB)")
    verb = "already holds" if summary.already_done else "holds"
    dropped = summary.manifest.dropped_frames
    tail = f"; {dropped} frames in leftovers shorter than a clip were dropped" if dropped else ""
    return f"{output} {verb} {', '.join(parts)}{tail}"
