"""Damaged inputs, at random: `python -m tests.fuzz --count 3000 --seed 1`, which is `make fuzz`.

Parquet files, images and answer texts are mutated and read as a user's are. Each gives a value, a finding of
`data check`, or a ValueError; any other exception is a defect, and so is memory that grows.

What clients send as images goes through the service's decoders (`--bodies 5000`): each gives pixels or a mistake within
seconds, and the decoders live, or are replaced.

Whole requests go to the service's application, with its routes, its guard and its decoders, but models that answer at
once (`--requests 2000`): each is answered, or is told within seconds what to change.
"""

import argparse
import asyncio
import io
import json
import random
import struct
import sys
import tempfile
import zlib
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
from serving.api import Problem
from serving.config import Key, Limits
from serving.decoding import Decoders
from serving.keys import new_key
from tests.encoded_images import DEEP, PIXELS, chunk, encoded, pages, png, tiff, turned
from tests.serving.fake_models import FakeModels
from tests.serving.fuzzed_requests import Reply, Sent, fuzzed, replied, requests
from tests.serving.in_process import application
from umrg.answers import format_answer, parse_answer
from umrg.dataset import Dataset, open_files
from umrg.images import decode_image, decode_mask, image_size
from umrg.mistake import Mistake

Corpus = Sequence[bytes]
WARM_UP = 50
GROWTH_MIB = 300
DECODERS = 3
DECODE_SECONDS, ANSWER_SECONDS = 3.0, 5.0
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


def image_bodies() -> list[bytes]:
    """What clients send as images: those that the service reads, in their varieties, and what is meant to break it."""
    files = [encoded(PIXELS, form, exif=turned(6)) for form in ("PNG", "JPEG", "TIFF", "WEBP")]
    files += [encoded(PIXELS, "JPEG", progressive=True), encoded(PIXELS, "WEBP", lossless=True)]
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "lzma", "zstd"):
        files.append(encoded(PIXELS, "TIFF", compression=compression))
    for compression in ("group3", "group4"):
        files.append(encoded(Image.fromarray(PIXELS).convert("1"), "TIFF", compression=compression))
    files += [png(DEEP[..., 0], 0), png(DEEP[..., :3], 2), png(DEEP, 6), tiff(DEEP[..., :3]), tiff(DEEP, orders=">")]
    files += [encoded(DEEP[..., 0].astype(kind), "TIFF") for kind in ("u2", "i4", "f4")]
    files += [pages("TIFF"), pages("TIFF", compression="tiff_lzw"), pages("WEBP"), pages("PNG"), pages("MPO")]
    files += image_files()
    return files + bombs() + [file[: len(file) * 2 // 3] for file in files] + polyglots()


def bombs() -> list[bytes]:
    """Small files of large images."""

    def header(width: int, height: int) -> bytes:
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))

    zeros = zlib.compress(bytes(2**24))
    text = chunk(b"zTXt", b"Comment\0\0" + zeros) + chunk(b"iCCP", b"profile\0\0" + zeros)
    made = [header(2**31 - 1, 2**31 - 1), header(60_000, 60_000) + chunk(b"IDAT", zeros), header(1, 1) + text]
    black = Image.new("1", (4000, 4000))
    made += [header(4800, 4800) + chunk(b"IDAT", zeros), encoded(black, "PNG"), encoded(black, "JPEG")]
    made.append(encoded(black, "TIFF", compression="group4"))
    # A TIFF whose page follows upon itself.
    cyclic = encoded(PIXELS, "TIFF")
    (directory,) = struct.unpack_from("<I", cyclic, 4)
    (entries,) = struct.unpack_from("<H", cyclic, directory)
    after = directory + 2 + 12 * entries
    made.append(cyclic[:after] + struct.pack("<I", directory) + cyclic[after + 4 :])
    return made


def polyglots() -> list[bytes]:
    """Files of two kinds."""
    picture, photo, scan = (encoded(PIXELS, form) for form in ("PNG", "JPEG", "TIFF"))
    return [
        picture + b"PK\x03\x04" + photo,
        photo + picture,
        b"%PDF-1.7\n" + photo,
        b"GIF89a/*" + picture,
        photo[:2] + b"\xff\xfe\x00\x20<script>alert(1)</script>...." + photo[2:],
        scan + photo,
        b"\x89PNG\r\n\x1a\n" + photo,
        b"II*\0" + picture,
    ]


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
        _keep(kind, data)
        raise
    return "read"


async def fuzz_decoders(count: int, seed: int, seconds: float = ANSWER_SECONDS) -> Counter[str]:
    """Send so many mutated images to real decoders; how many came back as pixels, as mistakes, and how. Raises
    AssertionError for what is neither, for memory that grows and for a pool that is not whole, and TimeoutError for an
    image that is not answered within so many seconds."""
    chance, outcomes, corpus = random.Random(seed), Counter[str](), image_bodies()
    bodies = ((mutated(chance.choice(corpus), chance), _way(chance)) for _ in range(count))
    limits = Limits(image_megapixels=25, decode_mib=512, decode_seconds=DECODE_SECONDS)
    decoders = Decoders(DECODERS, limits)
    await decoders.start()

    async def client() -> None:
        for data, (window, frame) in bodies:
            outcomes[f"body {await _decoded(decoders, data, window, frame, seconds)}"] += 1

    async def clients() -> None:
        # One fewer than decoders: none waits for a decoder that starts.
        await asyncio.gather(*(client() for _ in range(DECODERS - 1)))

    try:
        resident = _resident(psutil.Process())
        await clients()
        grown = _resident(psutil.Process()) - resident
        assert grown < GROWTH_MIB, f"memory grew by {grown} MiB"
        await asyncio.gather(*(decoders.decode(corpus[0], window=None, frame=None) for _ in range(4 * DECODERS)))
        living = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
        assert len(living) == DECODERS, living
        assert max(map(_resident, living)) < GROWTH_MIB
    finally:
        await decoders.stop()
    return outcomes


async def fuzz_requests(count: int, seed: int, seconds: float = ANSWER_SECONDS) -> Counter[str]:
    """Send so many mutated requests to the application; how many were answered with which status. Raises what escapes
    it, AssertionError for a reply that is neither an answer nor a problem of the client's, and for memory that grows,
    and TimeoutError for a request that is not answered within so many seconds."""
    chance, outcomes, models = random.Random(seed), Counter[str](), FakeModels()
    secret, digest = new_key()
    good, files = requests(image_files()[0], secret), image_bodies()
    limits = Limits(image_megapixels=25, decode_mib=512, decode_seconds=DECODE_SECONDS)
    decoders = Decoders(DECODERS, limits)
    key = Key(name="fuzz", sha256=digest, per_minute=10**9)
    app = application(models, decoder=decoders, keys=(key,), limits=limits.model_dump())
    await decoders.start()

    async def ask(sent: Sent) -> Reply:
        try:
            async with asyncio.timeout(seconds):
                reply = await replied(app, sent, chance)
            check_reply(sent, reply)
        except BaseException:
            _keep("request", repr(sent).encode())
            raise
        # It keeps what it was asked.
        for kept in (models.pictures, models.asks, models.calls):
            kept.clear()
        return reply

    try:
        for sent in good:
            assert (await ask(sent)).status in (200, 404), sent
        resident = _resident(psutil.Process())
        for _ in range(count):
            reply = await ask(fuzzed(good, files, mutated, chance))
            outcomes[f"request {reply.status or 'abandoned'}"] += 1
        grown = _resident(psutil.Process()) - resident
        assert grown < GROWTH_MIB, f"memory grew by {grown} MiB"
    finally:
        await decoders.stop()
    return outcomes


def check_reply(sent: Sent, reply: Reply) -> None:
    """Raise AssertionError for what is neither an answer nor a client's problem."""
    assert reply.status in (200, 204) or 400 <= reply.status < 500 or (reply.status == 0 and not sent.whole), reply
    assert b'"type":"internal"' not in reply.body, reply
    if reply.status >= 400 and reply.body:
        problem = Problem.model_validate_json(reply.body)
        assert problem.type and (b"x-request-id", problem.request_id.encode()) in reply.headers, reply


def _way(chance: random.Random) -> tuple[str | None, int | None]:
    return chance.choice((None, None, "p1,p99", "30000,20000")), chance.choice((None, None, 0, 1))


async def _decoded(decoders: Decoders, data: bytes, window: str | None, frame: int | None, seconds: float) -> str:
    try:
        async with asyncio.timeout(seconds):
            pixels = await decoders.decode(data, window=window, frame=frame)
    except Mistake as error:
        assert str(error).isprintable(), f"more than a line: {error!r}"
        return next((kind for kind in ("needs more", "decoder ended") if kind in str(error)), "refused")
    except BaseException:
        _keep("body", data)
        raise
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
    return "read"


def _resident(process: psutil.Process) -> int:
    """Memory of a process, in MiB."""
    return int(process.memory_info().rss) >> 20


def _keep(kind: str, data: bytes) -> None:
    kept = Path(tempfile.gettempdir()) / f"fuzz-{kind}.bin"
    kept.write_bytes(data)
    print(f"the input that did it is kept in {kept}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--bodies", type=int, default=5000)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    outcomes = fuzz(options.count, options.seed) + asyncio.run(fuzz_decoders(options.bodies, options.seed))
    outcomes += asyncio.run(fuzz_requests(options.requests, options.seed))
    for outcome, times in sorted(outcomes.items()):
        print(f"{outcome:<20}{times:>8}")


if __name__ == "__main__":
    main()
