"""Pools of the service's decoders, to test with."""

import asyncio
import struct
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from serving.config import Limits
from serving.decoding import Decoders
from tests.encoded_images import (
    PIXELS,
    chunk,
    encoded,
)
from umrg.mistake import Mistake

SECONDS = 60.0
DOT = encoded(PIXELS, "PNG")


def run(test: Coroutine[Any, Any, None], loop: Callable[[], asyncio.AbstractEventLoop] | None = None) -> None:
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(asyncio.wait_for(test, SECONDS))


@asynccontextmanager
async def pool(count: int = 1, program: Path | None = None, **limits: Any) -> AsyncIterator[Decoders]:
    options = {} if program is None else {"program": str(program)}
    decoders = Decoders(count, Limits(**limits), **options)
    await decoders.start()
    try:
        yield decoders
    finally:
        await decoders.stop()
    assert not living()


async def decoded(decoders: Decoders, file: bytes, window: str | None = None, frame: int | None = None):
    return await decoders.decode(file, window=window, frame=frame)


async def refused(decoders: Decoders, file: bytes, **options: Any) -> str:
    with pytest.raises(Mistake) as error:
        await decoded(decoders, file, **options)
    return str(error.value)


def living() -> list[psutil.Process]:
    """The decoders of this process, which has other children where tests before this one used multiprocessing."""
    return [child for child in psutil.Process().children() if _decodes(child)]


def _decodes(child: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):  # it ends just now
        return child.status() != psutil.STATUS_ZOMBIE and not any("multiprocessing" in each for each in child.cmdline())
    return False


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not holds():
            await asyncio.sleep(0.01)


def black(width: int, height: int, colour: int = 0) -> bytes:
    """A PNG that is small as a file and large as an image."""
    row = b"\0" + bytes(width * {0: 1, 2: 3}[colour])
    compressor = zlib.compressobj(1)
    rows = b"".join(compressor.compress(row) for _ in range(height)) + compressor.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
