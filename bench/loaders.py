"""The time of loading data: ``python bench/loaders.py [--folder TREE]``.

Images per second of the loaders, crop and flip included: the device-resident loader from memory and
from a tree of JPEGs (decoded once, timed separately), and DALI's stream of the same files. A turn
of a loader is one epoch; turns are interleaved, as in every comparison here. The share is that of a
PGD-10 AT step of PreActResNet-18 on this device, the newest in ``bench/results/``, if loading does
not overlap with it; on a GPU DALI's decoding does. Without ``--folder`` a tree of smooth images is
written into a temporary folder. Takes less than a minute; the machine must do nothing else.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastadv.benchmark.arithmetic import Spread
from fastadv.benchmark.clock import seconds
from fastadv.benchmark.interleave import Candidate, interleave
from fastadv.benchmark.rows import Row, append_rows, provenance, read_rows, results_file
from fastadv.data import DaliLoader, DeviceLoader, Loader, list_images, stream_format
from fastadv.data.decode import decode, in_threads
from fastadv.engine.process.device import choose_device
from fastadv.errors import UserError

RESULTS = Path(__file__).parent / "results"
CLASSES = 10
VIEWS = {"pad": 4, "flip": True, "channels_last": True}


def main() -> None:
    """Parse the command line, time the loaders, write and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="a tree of image files: train/ and test/")
    parser.add_argument("--images", type=int, default=4096, help="number of images to read")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", default="64,128")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    device = choose_device(given.device)
    file = results_file(given.out, device)
    step = step_of_an_image(read_rows(file) if file.exists() else [])
    origin = provenance(device)
    with _tree(given) as tree:
        for size in map(int, given.batch_size.split(",")):
            for row in rows(tree, given.images, size, device, given.repeats, step):
                append_rows(file, [row | origin])
                print(
                    f"{row['loader']:6} from {row['source']:6} batch {size:4} "
                    f"{row['images_per_s']['median']:9,.0f} images/s, "
                    f"{row['ms']['median']:.2f} ms per batch, "
                    f"{100 * row['of_step']:.2f} % of a step"
                )


def rows(
    tree: str, images: int, batch_size: int, device: torch.device, repeats: int, step: float
) -> Iterator[Row]:
    """A row for every loader of the first ``images`` images of ``tree`` (a data set's name).

    ``step``: seconds of a training step per image.
    """
    loaders, facts = _loaders(tree, images, batch_size, device)
    candidates = [Candidate(name, _epochs(loader, device)) for name, loader in loaders.items()]
    times = interleave(candidates, repeats)
    for name, loader in loaders.items():
        seen = len(loader) * batch_size
        batch = Spread.of(times[name]).times(1 / len(loader))
        kind, source = name.split(" from ")
        yield {
            "kind": "loader",
            "loader": kind,
            "source": source,
            "config": {"batch_size": batch_size, "images": seen} | VIEWS,
            "ms": batch.times(1e3).as_row(),
            "images_per_s": Spread.of([seen / s for s in times[name]]).as_row(),
            "step_ms": round(1e3 * step * batch_size, 1),
            "of_step": round(batch.median / (step * batch_size), 5),
            **facts,
        }


def _loaders(
    tree: str, images: int, batch_size: int, device: torch.device
) -> tuple[dict[str, Loader], dict[str, Any]]:
    """The loaders by name, and the row's fields that describe the tree."""
    options: dict[str, Any] = {"batch_size": batch_size, "device": device, "drop_last": True}
    options |= VIEWS
    found = list_images(tree)
    files, classes = found.train_files[:images], found.train_labels[:images]
    form, labels = stream_format(found), torch.tensor(classes)
    began = time.perf_counter()
    decoded = in_threads(lambda file: torch.from_numpy(decode(file, form).copy()), files)
    store = torch.stack(list(decoded))
    spent = time.perf_counter() - began
    random = torch.randint(256, store.shape, dtype=torch.uint8)
    loaders: dict[str, Loader] = {
        "device from memory": DeviceLoader(random, labels, **options),
        "device from files": DeviceLoader(store, labels, **options),
        "dali from files": DaliLoader(files, classes, form, **options),
    }
    return loaders, {"image_size": form.height, "decode_s": round(spent, 2)}


def _epochs(loader: Loader, device: torch.device) -> Any:
    """A function that times one epoch, in seconds; the first epoch, a warm-up, is already done."""
    number = 0

    def epoch() -> None:
        nonlocal number
        for _ in loader.epoch(number):
            pass
        number += 1

    epoch()
    return lambda: seconds(epoch, device)


def step_of_an_image(found: list[Row]) -> float:
    """Seconds per image of the newest PGD-10 AT step of PreActResNet-18 at 32x32, fastest mode."""
    published = {"model": "preact_resnet18", "width": None, "image_size": 32}
    steps = [
        row
        for row in found
        if row["kind"] == "step"
        and (row["by"], row["method"]) == ("fastadv", "pgd")
        and published.items() <= row["config"].items()
    ]
    if not steps:
        raise UserError(
            "There is no PGD-10 step of this device yet: run bench/throughput.py first."
        )
    last = max(row["date"] for row in steps)
    return min(1 / row["images_per_s"] for row in steps if row["date"] == last)


@contextmanager
def _tree(given: argparse.Namespace) -> Iterator[str]:
    """The tree as a name of a data set; without ``--folder`` it is written first."""
    if given.folder is not None:
        yield f"folder:{given.folder}"
        return
    with tempfile.TemporaryDirectory() as folder:
        write_tree(Path(folder), given.images, given.image_size)
        yield f"folder:{folder}"


def write_tree(folder: Path, count: int, size: int) -> None:
    """Write ``count`` training and ten test JPEGs of smooth random pixels, in ten classes."""
    random = np.random.default_rng(0)
    for part, many in (("train", count), ("test", CLASSES)):
        for number in range(many):
            place = folder / part / str(number % CLASSES)
            place.mkdir(parents=True, exist_ok=True)
            coarse = random.integers(0, 256, (size // 4, size // 4, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
            image.save(place / f"{number:05}.jpg", quality=95)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
