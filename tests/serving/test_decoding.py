"""Images are decoded in processes that a file may take down."""

import asyncio
import struct

import numpy as np
import psutil
import pytest

from serving.config import Limits
from serving.decoding import Decoders
from serving.messages import Unavailable
from tests.decoders import DOT, black, decoded, living, pool, refused, run, until
from tests.encoded_images import (
    BLOCKS,
    COLOURS,
    DEEP,
    MODES,
    PIXELS,
    UPRIGHT,
    chunk,
    encoded,
    in_mode,
    pages,
    png,
    stack,
    tiff,
    turned,
)
from umrg.images import decode_image
from umrg.mistake import Mistake
from umrg.windowing import Window


def loops():
    """Those that a service may run on."""
    uvloop = pytest.importorskip("uvloop")
    return {"asyncio": None, "uvloop": uvloop.new_event_loop}


# What they give


def readable() -> dict[str, tuple[bytes, str | None, int | None]]:
    """Files, windows and frames of all kinds that are read."""
    kept = {"PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), "JPEG": ("L", "RGB", "CMYK")}
    kept |= {"TIFF": MODES, "WEBP": ("L", "RGB", "RGBA")}
    files: dict[str, tuple[bytes, str | None, int | None]] = {}
    for form, modes in kept.items():
        for mode in set(modes) - {"PA", "HSV", "RGBa"}:
            window = "p1,p99" if mode[0] in "IF" else None
            files[f"{form} {mode}"] = (encoded(in_mode(mode), form), window, None)
        for orientation in UPRIGHT:
            files[f"{form} turned {orientation}"] = (encoded(BLOCKS, form, exif=turned(orientation)), None, None)
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "lzma", "zstd"):
        files[f"TIFF {compression}"] = (encoded(PIXELS, "TIFF", compression=compression), None, None)
    files["TIFF group4"] = (encoded(in_mode("1"), "TIFF", compression="group4"), None, None)
    for name, file in {
        "PNG": png(DEEP[..., :3], 2),
        "TIFF": tiff(DEEP[..., :3]),
        "TIFF big": tiff(DEEP, orders=">"),
    }.items():
        files[f"{name} deep"] = (file, "30000,20000", None)
        files[f"{name} deep by percentiles"] = (file, "p2.5,p97.5", None)
    for form in ("TIFF", "WEBP", "PNG"):
        files[f"{form} page"] = (pages(form, **({"lossless": True} if form == "WEBP" else {})), None, 2)
    return files


def test_pixels_are_those_of_the_one_image_decoder():
    async def test() -> None:
        async with pool() as decoders:
            (decoder,) = living()
            for name, (file, window, frame) in readable().items():
                expected = decode_image(
                    file, "the image", window=None if window is None else Window.parse(window), frame=frame
                )
                found = await decoded(decoders, file, window, frame)
                assert np.array_equal(found, expected), name
                assert found.flags.writeable and found.flags.c_contiguous
            assert decoder.is_running()

    run(test())


def test_a_page_that_is_asked_for_is_given():
    async def test() -> None:
        async with pool() as decoders:
            for page, expected in enumerate(stack()):
                assert np.array_equal(await decoded(decoders, pages("TIFF"), frame=page), np.asarray(expected))
            assert "3 pages" in await refused(decoders, pages("TIFF"))
            assert "no frame 3" in await refused(decoders, pages("TIFF"), frame=3)
            assert "no frame" in await refused(decoders, DOT, frame=2**80)

    run(test())


def test_what_cannot_be_read_is_told_in_a_sentence():
    files = {
        b"": "the image cannot be decoded (the file is empty); write or download it again",
        b"nonsense": "the image cannot be decoded (unknown format); it must be a PNG, JPEG, TIFF, WebP or the like",
        DOT[:80]: "the image cannot be decoded (",
        bytes(128) + b"DICM" + bytes(100): "the image cannot be decoded (DICOM); export the slice",
        # Formats that the service does not read, although `ground` does.
        encoded(
            PIXELS, "GIF"
        ): "the image cannot be decoded (GIF, which is not read here); save it as PNG, JPEG or TIFF",
        encoded(PIXELS, "JPEG2000"): "the image cannot be decoded (JPEG 2000, which is not read here)",
        encoded(PIXELS, "PPM"): "the image cannot be decoded (unknown format)",
        encoded(DEEP[..., 0], "PNG"): "the image has more than 8 bits a channel (16); window it",
    }

    async def test() -> None:
        async with pool() as decoders:
            for file, sentence in files.items():
                assert (await refused(decoders, file)).startswith(sentence)
            assert (await refused(decoders, DOT, window="p99,p1")).startswith("the window p99,p1 has no levels")
            assert np.array_equal(await decoded(decoders, DOT), PIXELS)

    run(test())


def test_transparency_lies_on_white():
    async def test() -> None:
        async with pool() as decoders:
            found = await decoded(decoders, encoded(COLOURS, "PNG"))
            assert found[0].tolist() == [[255, 255, 255], [200, 100, 50], [233, 193, 173]]

    run(test())


# What they stand


def test_pixels_are_counted_before_they_are_decoded():
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    small, large = stack()[0], stack()[0].resize((1200, 1000))
    files: list[tuple[bytes, int | None]] = [
        (bomb, None),
        (black(1001, 1000), None),
        (encoded(large, "WEBP"), None),
        (encoded(large, "TIFF"), None),
    ]
    files.append((encoded(small, "TIFF", save_all=True, append_images=[large]), 1))

    async def test() -> None:
        async with pool(image_megapixels=1) as decoders:
            for file, frame in files:
                assert "the image has more than 1000000 pixels" in await refused(decoders, file, frame=frame)
            assert (await decoded(decoders, black(1000, 1000))).shape == (1000, 1000, 3)

    run(test())


def test_more_memory_than_allowed_is_refused_and_the_decoder_replaced():
    async def test() -> None:
        async with pool(decode_mib=256) as decoders:
            (before,) = living()
            assert "needs more than 256 MiB" in await refused(decoders, black(9000, 9000, 2))
            assert np.array_equal(await decoded(decoders, DOT), PIXELS)
            assert living() != [before]

    run(test())


def test_more_time_than_allowed_is_refused_and_the_decoder_replaced():
    async def test() -> None:
        async with pool(decode_seconds=0.05) as decoders:
            (before,) = living()
            assert "needs more than 0.05 s" in await refused(decoders, black(9000, 9000, 2))
            await until(lambda: bool(living()) and living() != [before])

    run(test())


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_decoder_that_ends_while_it_decodes_fails_its_image_alone(loop):
    async def test() -> None:
        async with pool(2) as decoders:
            lost = asyncio.create_task(decoded(decoders, black(9000, 9000, 2)))
            busy = await working()
            assert np.array_equal(await decoded(decoders, DOT), PIXELS)
            busy.kill()
            with pytest.raises(Mistake, match="could not be decoded: its decoder ended"):
                await lost
            await whole(decoders, 2)

    run(test(), loops()[loop])


def test_a_decoder_that_was_ended_before_is_not_the_files_fault():
    async def test() -> None:
        async with pool(3) as decoders:
            for _ in range(5):
                for each in living():
                    each.kill()
                assert np.array_equal(await decoded(decoders, DOT), PIXELS)
            await whole(decoders, 3)

    run(test())


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_cancelled_requests_leave_the_pool_whole(loop):
    async def test() -> None:
        async with pool(2) as decoders:
            tasks = [asyncio.create_task(decoded(decoders, black(5000, 5000, 2))) for _ in range(8)]
            await working()
            # Some of these are decoded, some wait.
            for task in tasks[::2]:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert [isinstance(result, asyncio.CancelledError) for result in results] == [True, False] * 4
            for result in results[1::2]:
                assert isinstance(result, np.ndarray) and result.shape == (5000, 5000, 3)
            # A decoder that starts in the place of another is waited for, and not by this one.
            for task in [asyncio.create_task(decoded(decoders, DOT)) for _ in range(20)]:
                await asyncio.sleep(0)
                task.cancel()
            await whole(decoders, 2)

    run(test(), loops()[loop])


def test_waiting_requests_are_answered_before_the_pool_ends_and_none_after():
    async def test() -> None:
        async with pool(1) as decoders:
            tasks = [asyncio.create_task(decoded(decoders, DOT)) for _ in range(4)]
            await asyncio.sleep(0)
            await decoders.stop()
            for found in await asyncio.gather(*tasks):
                assert np.array_equal(found, PIXELS)
            with pytest.raises(Unavailable, match="the service ends"):
                await decoded(decoders, DOT)

    run(test())


def test_decoders_that_do_not_start_are_told_at_once(capfd):
    async def test() -> None:
        with pytest.raises(Unavailable, match=r"limits\.decode_mib may be too small"):
            await Decoders(2, Limits(decode_mib=32)).start()
        assert not living()

    run(test())


async def working() -> psutil.Process:
    """A decoder in the middle of an image."""
    before = {each: sum(each.cpu_times()[:2]) for each in living()}
    found: list[psutil.Process] = []

    def works() -> bool:
        found[:] = [each for each in living() if sum(each.cpu_times()[:2]) > before.get(each, 0.0) + 0.1]
        return bool(found)

    await until(works)
    return found[0]


async def whole(decoders: Decoders, count: int) -> None:
    """Assert that the pool has so many decoders, and that each decodes."""
    for found in await asyncio.gather(*(decoded(decoders, DOT) for _ in range(4 * count))):
        assert np.array_equal(found, PIXELS)
    await until(lambda: len(living()) == count)
