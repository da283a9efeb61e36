"""``scaling4d export``: the backbone of a checkpoint as one file in the released layout.

Responsible for: flags, the progress line and what is printed. Not responsible for: the file (``released.py``) or
reading checkpoints (``pretrained/read_checkpoint.py``). ``--help`` loads nothing heavy, so the heavy imports are inside
``main``.
"""

import argparse
import posixpath
from collections.abc import Sequence

from scaling4d import exits
from scaling4d.errors import UserError
from scaling4d.interrupts import StopRequest

_OVERHEAD = 1024  # bytes of an npz file for the name and header of an array, at most


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scaling4d export",
        description="Writes the backbone of a checkpoint in the layout of the released 4DS files: an npz of float32 "
        "arrays, without the coarse tokens and the projection to pixels, and model.json beside it.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="MODEL_DIR", help="a run folder, or MODEL_DIR/checkpoints/STEP")
    add("--output", required=True, metavar="FILE.npz", help="the file to write; its folder also gets model.json")
    add("--step", type=int, metavar="N", help="of the run's checkpoints (the newest)")
    add("--ema", action="store_true", help="the moving average of the parameters, if the run keeps one")
    add("--overwrite", action="store_true", help="replace FILE.npz, and a model.json of another export beside it")
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code, raises UserError for mistakes of the user."""
    flags = build_parser().parse_args(argv)
    parent, name = posixpath.split(flags.output)
    if not name.endswith(".npz"):
        raise UserError(f"--output={flags.output} is not the name of an npz file: end it in .npz")
    if flags.checkpoint.endswith(".npz"):
        raise UserError(f"--checkpoint={flags.checkpoint} is an npz file already: give the MODEL_DIR of a run")

    with StopRequest("stopping") as stop:
        return _export(flags, parent or ".", name, stop)


def _export(flags: argparse.Namespace, parent: str, name: str, stop: StopRequest) -> int:
    from scaling4d import model_json
    from scaling4d.countdown import Countdown
    from scaling4d.export import released
    from scaling4d.pretrained.read_checkpoint import ReadCheckpoint, float32_bytes
    from scaling4d.results_folder import ResultsFolder

    folder = ResultsFolder(parent)
    if not flags.overwrite:
        folder.check_new([name])
    arrays = ReadCheckpoint(flags.checkpoint, flags.step, flags.ema)
    released.check_described(arrays, arrays.model)
    record = released.export_record(arrays.model, name, step=arrays.step, ema=arrays.ema)
    released.check_beside(folder, record, overwrite=flags.overwrite)
    names = released.backbone_names(arrays.shapes)
    size = float32_bytes(arrays.shapes, names)
    folder.create()
    folder.check_space(size + _OVERHEAD * len(names))
    progress = Countdown("export", size / 1e6, "MB", stop)
    arrays.on_bytes = lambda done: progress(done / 1e6)
    try:
        progress(0)
        path = released.save_backbone(folder, name, released.read_backbone(arrays), record)
    finally:
        progress.close()
    which = "the moving average of step" if arrays.ema else "step"
    print(f"{path}: {len(names)} arrays, {size // 4:,} values, {size / 1e6:,.1f} MB, {which} {arrays.step}")
    if arrays.model.get("ema") and not arrays.ema:
        print("the run also keeps a moving average of its parameters: --ema")
    others = [other for other in folder.glob("*.npz") if other != name]
    if others and flags.overwrite:
        print(f"{model_json.NAME} beside it describes {name} alone, not {', '.join(others)}")
    print(f"\nnext: scaling4d features --checkpoint={path} --video=FILE --output=DIR")
    return exits.DONE
