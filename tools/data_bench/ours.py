"""The measured loaders that are ours: ``python ours.py stream|workers|floor SET --cores N``.

Responsible for: ``stream``, the whole path of training (records, order, CRC, decoding in threads, batches);
``workers``, the same with decode processes; ``floor``, reading nothing: the same examples by the same decoder from
records that are in memory already, on as many threads. Not responsible for: other people's loaders (``peers.py``).
"""

import argparse
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import lane


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("stream", "workers", "floor"))
    parser.add_argument("set")
    parser.add_argument("--cores", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--repeats", type=int, default=1)
    flags = parser.parse_args()
    lane.keep_to(flags.cores)
    if flags.kind == "floor":
        take = floor(flags.set, flags.cores)
    else:
        take = stream(flags.set, flags.batch, flags.repeats, flags.cores if flags.kind == "workers" else 0)
    lane.serve(take, warm=6 * flags.batch)


def stream(directory: str, batch: int, repeats: int, workers: int) -> Callable[[int], None]:
    from scaling4d.data.clip_data import ClipData

    data = ClipData(directory=directory, repeats=repeats, workers=workers)
    batches = data.train_stream(batch_size=batch, slots=range(batch), start=0)

    def take(clips: int) -> None:
        for _ in range(clips // batch):
            if next(batches)["bad"].any():
                raise SystemExit(f"{directory}: a bad record")

    return take


def floor(directory: str, cores: int) -> Callable[[int], None]:
    from scaling4d.data.clips import decode_fields
    from scaling4d.data.decode import ClipSettings
    from scaling4d.data.manifest import open_split, read_manifest
    from scaling4d.data.order import Draws, epoch_and_record

    records = open_split(directory, read_manifest(directory), "train")
    fields = [records.read(number) for number in range(len(records))]
    settings = ClipSettings()
    # Which clip comes when is not part of the floor; as many epochs as any run of this benchmark takes.
    order = [epoch_and_record(0, index, len(fields), "shuffled")[1] for index in range(100 * len(fields))]
    indices = itertools.count()

    def one(index: int) -> None:
        decode_fields(records, fields[order[index % len(order)]], settings, [Draws(0, index)])

    if cores == 1:
        return lambda clips: [one(next(indices)) for _ in range(clips)] and None
    pool = ThreadPoolExecutor(cores)
    return lambda clips: [*pool.map(one, [next(indices) for _ in range(clips)])] and None


if __name__ == "__main__":
    main()
