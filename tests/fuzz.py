"""Damaged inputs, at random: `python -m tests.fuzz --count 3000 --seed 1`, which is `make fuzz`.

Parquet files, images and answer texts are mutated and read as a user's are. Each gives a value, a finding of
`data check`, or a ValueError; any other exception is a defect, and so is memory that grows.
"""

import argparse
import io
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cluster.commands.data_check import check_files
from phantoms import rows
from umrg.answers import format_answer, parse_answer
from umrg.dataset import Dataset, open_files
from umrg.images import decode_image, decode_mask, image_size

Corpus = Sequence[bytes]
WARM_UP = 50
GROWTH_MIB = 300
_WORDS = (
    b"<think>",
    b"</think>",
    b"<answer>",
    b"</answer>",
    b'{"bbox": [',
    b"[[[[",
    b"NaN",
    b"1e999",
    b"'",
    b'"',
    b"\\u",
)


def mutated(seed: bytes, chance: random.Random) -> bytes:
    """A file with a few bytes flipped, cut, doubled, blanked or put in."""
    data = bytearray(seed)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 16))):
        # A parquet file's footer is its end.
        at = chance.randrange(chance.choice((0, len(data) // 2)), len(data) + 1)
        length = chance.choice((1, 2, 4, 16, 256))
        # Mostly flips: what moves the rest of a file is refused by its footer or its header, and nothing else is tried.
        match chance.choice((0, 0, 0, 0, 0, 0, 1, 2, 3, 3, 4, 5)):
            case 0 if at < len(data):
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                del data[at : at + length]
            case 2:
                data[at:at] = data[at : at + length]
            case 3:
                data[at : at + length] = bytes(len(data[at : at + length]))
            case 4:
                data[at:at] = chance.choice(_WORDS)
            case _:
                del data[at:]
    return bytes(data)


def parquet_files() -> list[bytes]:
    """Two phantoms, as several writers lay them out."""
    table = pa.Table.from_pylist(list(rows(2, seed=1, size=112)))
    layouts: list[dict[str, object]] = [
        {},
        {"compression": "none"},
        {"compression": "zstd", "use_dictionary": False},
        {"row_group_size": 1, "data_page_version": "2.0"},
    ]
    files = []
    for layout in layouts:
        buffer = io.BytesIO()
        pq.write_table(table, buffer, **layout)
        files.append(buffer.getvalue())
    return files


def image_files() -> list[bytes]:
    """A small picture in the modes and formats that people have."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 4), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    made = [("PNG", "RGBA"), ("PNG", "P"), ("PNG", "I;16"), ("PNG", "L"), ("JPEG", "RGB"), ("JPEG", "CMYK")]
    made += [("TIFF", "RGB"), ("TIFF", "LA"), ("GIF", "P"), ("WEBP", "RGBA"), ("BMP", "RGB"), ("JPEG2000", "RGB")]
    files = []
    for kind, mode in made:
        buffer = io.BytesIO()
        (picture.convert("L") if mode == "I;16" else picture).convert(mode).save(buffer, kind)
        files.append(buffer.getvalue())
    return files


def answer_texts() -> list[bytes]:
    box, points = (1.0, 2.0, 30.0, 40.0), ((5.0, 6.0), (7.0, 8.0))
    plain = format_answer(box=box, points=points, think="It lies here.")
    fields = {"bbox_2d": box, "point_2d": points, "label": "it"}
    return [text.encode() for text in (plain, plain.replace('"', "'"), f"```json\n{json.dumps([fields])}\n```")]


def read_parquet(data: bytes, folder: Path) -> None:
    """Through `data check`, whose clean copy holds the rows that it finds usable, and through the reader."""
    path, clean = folder / "mutated.parquet", folder / "clean.parquet"
    path.write_bytes(data)
    report = check_files(open_files([path]), clean=clean)
    if usable := report.rows - report.unusable:
        assert len(Dataset.open(clean)) == usable
    for sample in Dataset.open(path):
        sample.image()
        sample.mask_union()


def read_image(data: bytes, _: Path) -> None:
    image = decode_image(data, "the image")
    size = image_size(data, "the image")
    assert image.shape == (size.height, size.width, 3) and image.dtype == np.uint8
    decode_mask(data, "the mask")


def read_answer(data: bytes, _: Path) -> None:
    parse_answer(data.decode(errors="replace"))


KINDS: dict[str, tuple[Callable[[], Corpus], Callable[[bytes, Path], None]]] = {
    "parquet": (parquet_files, read_parquet),
    "image": (image_files, read_image),
    "answer": (answer_texts, read_answer),
}


def fuzz(count: int, seed: int) -> Counter[str]:
    """Read so many mutated inputs, a third of each kind; how many were read and refused. Raises AssertionError for
    memory that grows, and whatever an input raised that is no ValueError, with the input kept beside."""
    chance = random.Random(seed)
    outcomes: Counter[str] = Counter()
    corpora = {kind: make() for kind, (make, _) in KINDS.items()}
    process = psutil.Process()
    resident = 0
    with tempfile.TemporaryDirectory() as name:
        for number in range(count):
            kind = list(KINDS)[number % len(KINDS)]
            data = mutated(chance.choice(corpora[kind]), chance)
            outcomes[f"{kind} {_outcome(kind, data, Path(name))}"] += 1
            if number == WARM_UP:
                resident = process.memory_info().rss
    grown = (process.memory_info().rss - resident) >> 20
    assert count <= WARM_UP or grown < GROWTH_MIB, f"memory grew by {grown} MiB"
    return outcomes


def _outcome(kind: str, data: bytes, folder: Path) -> str:
    try:
        KINDS[kind][1](data, folder)
    except ValueError as error:
        assert "\n" not in str(error), f"more than a line: {error}"
        return "refused"
    except BaseException:
        kept = Path(tempfile.gettempdir()) / f"fuzz-{kind}.bin"
        kept.write_bytes(data)
        print(f"the input that did it is kept in {kept}", file=sys.stderr)
        raise
    return "read"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for outcome, times in sorted(fuzz(options.count, options.seed).items()):
        print(f"{outcome:<20}{times:>8}")


if __name__ == "__main__":
    main()
