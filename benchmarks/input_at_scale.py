"""What a data set of ImageNet's number of images costs before the first batch, after an interruption, and in memory.

    python benchmarks/input_at_scale.py --out results/input/scale.json

Makes a folder, Parquet files and tar shards of tiny JPEG files (some 5 GB, mostly of the tar shards), and loads each in
a process of its own. ``private`` is what a process does not share with the others (USS), in MiB.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
from PIL import Image

from awconv.bench.report import environment

CLASSES, KINDS, BATCH = 1000, 64, 256
FILES = {"ImageFolder": "folder", "Parquet": "parquet", "WebDataset": "tar"}


def small_jpegs() -> list[bytes]:
    generator = np.random.default_rng(0)
    found = []
    for _ in range(KINDS):
        file = io.BytesIO()
        noise = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        noise.resize((32, 32)).save(file, "JPEG")
        found.append(file.getvalue())
    return found


def write(reader: str, place: Path, images: int) -> None:
    """Writes the layout of a reader. The names and the order are those of ImageNet and of its usual shards."""
    jpegs, order = small_jpegs(), np.random.default_rng(1).permutation(images) % CLASSES
    if reader == "ImageFolder":
        for number, content in enumerate(jpegs):
            (place / f"{number}.jpg").write_bytes(content)
        for label in range(CLASSES):
            folder = place / "folder" / "train" / f"n{label:08}"
            folder.mkdir(parents=True)
            for index in range(images // CLASSES):
                os.link(place / f"{(7 * label + index) % KINDS}.jpg", folder / f"n{label:08}_{index}.JPEG")
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    (place / FILES[reader]).mkdir()
    shards = min(294 if reader == "Parquet" else 1000, images // 100)
    for shard, labels in enumerate(np.array_split(order, shards)):
        contents = [jpegs[(7 * int(label) + index) % KINDS] for index, label in enumerate(labels)]
        if reader == "Parquet":
            columns = {"image": [{"bytes": content, "path": None} for content in contents], "label": pa.array(labels)}
            path = place / "parquet" / f"train-{shard:05}.parquet"
            pq.write_table(pa.table(columns), path, row_group_size=100, use_dictionary=False)
            continue
        with open(place / "tar" / f"train-{shard:04}.tar", "wb") as file:
            for index, (content, label) in enumerate(zip(contents, labels, strict=True)):
                for ending, data in (("jpg", content), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{shard:04}{index:06}.{ending}")
                    member.size = len(data)
                    file.write(member.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE))
            file.write(bytes(2 * tarfile.BLOCKSIZE))


def load(reader: str, place: Path, share_done: float, seconds: float, workers: int) -> dict[str, Any]:
    """Loads from a share of the epoch on, for some seconds or to its end."""
    from awconv import data

    source = {
        "ImageFolder": str(place / "folder"),
        "Parquet": str(place / "parquet" / "*.parquet"),
        "WebDataset": str(place / "tar" / "*.tar"),
    }[reader]
    begun = time.perf_counter()
    module = getattr(data, reader)(source, image_size=8, batch_size=BATCH, num_workers=workers)
    module.in_memory = False
    images = len(module.dataset("train"))
    module._batches_done = lambda: int(share_done * (images // BATCH))
    indexed = time.perf_counter()
    batches = iter(module.train_dataloader())
    next(batches)
    first = time.perf_counter()
    main, memory, loaded = psutil.Process(), [], BATCH
    while not memory or time.perf_counter() - first < seconds:
        workers_now = main.children(recursive=True)
        private = [round(one.memory_full_info().uss / 2**20) for one in (main, *workers_now)]
        memory.append(dict(images=loaded, main=private[0], workers=private[1:]))
        until = time.perf_counter() + seconds / 10
        while time.perf_counter() < until and next(batches, None) is not None:
            loaded += BATCH
    return dict(images=images, index=indexed - begun, first_batch=first - begun, private=memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1_281_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=150, help="to stream each layout for")
    parser.add_argument("--readers", nargs="+", default=list(FILES))
    parser.add_argument("--place", type=Path, help="an empty folder for the files, which stay there; or one of before")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--load", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        reader, done, seconds = arguments.load
        print(json.dumps(load(reader, arguments.place, float(done), float(seconds), arguments.workers)), flush=True)
        os._exit(0)  # the workers wait for batches that nobody takes
    found: dict[str, Any] = {}
    with TemporaryDirectory() as temporary:
        place = arguments.place or Path(temporary)
        for reader in arguments.readers:
            if not (place / FILES[reader]).exists():
                write(reader, place, arguments.images)
            found[reader] = {}
            for work, done, seconds in (("first", 0.0, arguments.seconds), ("resumed", 0.9, 0.0)):
                command = [sys.executable, __file__, "--workers", str(arguments.workers), "--place", str(place)]
                command += ["--load", reader, str(done), str(seconds)]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found[reader][work] = json.loads(output.splitlines()[-1])
                print(reader, work, found[reader][work], flush=True)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        facts = dict(environment=environment("cpu"), workers=arguments.workers, readers=found)
        arguments.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
