"""Decodes what clients send, in processes that a file may take down without harm (`serving.decoder_process`).

A file that takes too long or too much memory, or that ends its decoder, is the request's mistake; the decoder is
replaced. Nothing that a decoder says is trusted: a file may have subverted it.
"""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Self

import numpy as np
from numpy.typing import NDArray

from serving import decoder_process
from serving.config import Limits
from serving.decoder_process import ANSWER, EXHAUSTED, PIXELS, READY, RECEIVED, REFUSED, REQUEST, SENTENCE
from serving.messages import Unavailable
from umrg.mistake import Mistake
from umrg.windowing import Window

_START_SECONDS, _END_SECONDS = 60.0, 10.0
# All that a decoder gets of the environment, which may hold secrets, beside the paths of modules and libraries.
_ENVIRONMENT = {
    # Threads would reserve memory.
    "OMP_NUM_THREADS": "1",
    # 64 MiB that an image has used stay with the process: to get them anew takes longer than to decode a small image.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
}
_LAST_FRAME = 2**62  # no file has so many


class Decoders:
    """A pool of decoders, each of which decodes one image at a time. Used from one event loop."""

    # By its path, because to import the package `serving` takes longer than all that a decoder needs.
    def __init__(self, count: int, limits: Limits, *, program: str = decoder_process.__file__) -> None:
        """count: processes. limits: of an image's pixels, and of the time and memory that each may take. program: the
        Python file that a decoder runs."""
        self._count, self._limits, self._program = count, limits, program
        # Each place of the pool is a decoder that is free, or on its way.
        self._free: asyncio.Queue[_Place] = asyncio.Queue()
        self._running = False

    async def start(self) -> None:
        """Start the decoders. Raises Unavailable where they do not start."""
        places = [self._place() for _ in range(self._count)]
        for place in places:
            self._free.put_nowait(place)
        self._running = True
        await asyncio.wait(places)
        if not all(map(_decoder, places)):
            await self.stop()
            raise Unavailable("the decoders of images do not start; limits.decode_mib may be too small")

    async def stop(self) -> None:
        """End the decoders, once the images that were sent are decoded."""
        if self._running:
            self._running = False
            for _ in range(self._count):
                place = await self._free.get()
                await asyncio.wait([place])
                if (decoder := _decoder(place)) is not None:
                    await decoder.end()

    async def decode(self, data: bytes, *, window: str | None, frame: int | None) -> NDArray[np.uint8]:
        """Decode an image file to uint8 [H, W, 3] RGB, upright and opaque, as `umrg.images.decode_image` does.

        window, frame: as a request has them; see `Window.parse`. Waits for a free decoder. Raises ValueError for a file
        that cannot be decoded within the limits, and Unavailable where no decoder can be started.
        """
        if window is not None:
            Window.parse(window)
        for fresh in (False, True):
            try:
                async with self._borrowed(fresh) as decoder:
                    return await decoder.decode(data, window, frame)
            except _NotReceived:
                # Something else has ended it, and maybe all of them: the file is not to blame.
                continue
        raise Unavailable("the decoders of images end before they have read a file; try again later")

    @asynccontextmanager
    async def _borrowed(self, fresh: bool) -> "AsyncIterator[_Decoder]":
        """A decoder that lives; with `fresh`, a new one. In its place comes another if it is left in the middle of an
        image. Raises _NotReceived for one that was on its way and does not start."""
        if not self._running:
            raise Unavailable("the service ends; try again later")
        place = await self._free.get()
        try:
            if place.done() and (fresh or not ((decoder := _decoder(place)) and decoder.alive)):
                place = self._place(_decoder(place))
            try:
                # Whoever is cancelled here leaves the decoder that starts to the next.
                decoder = await asyncio.shield(place)
            except Unavailable as error:
                if fresh:
                    raise
                raise _NotReceived from error
            yield decoder
        finally:
            if (decoder := _decoder(place)) and not decoder.idle:
                decoder.kill()
                place = self._place(decoder)
            self._free.put_nowait(place)

    def _place(self, former: "_Decoder | None" = None) -> "_Place":
        """A decoder on its way. former: the one whose place it takes."""

        async def started() -> _Decoder:
            if former is not None:
                await former.end()
            return await _Decoder.start(self._limits, self._program)

        return asyncio.create_task(started())


def _decoder(place: "_Place") -> "_Decoder | None":
    """The decoder in a place of the pool; None while it starts, and where it did not."""
    if not place.done() or place.cancelled() or place.exception() is not None:
        return None
    return place.result()


class _NotReceived(Exception):
    """The decoder has ended before it read the file, or before it was ready."""


class _Decoder:
    """One decoder's process, and the socket through which it is spoken with."""

    def __init__(self, process: subprocess.Popen[bytes], connection: socket.socket, limits: Limits) -> None:
        self._process, self._connection, self._limits = process, connection, limits
        self.idle = True
        """Whether it has answered everything that it was sent."""

    @classmethod
    async def start(cls, limits: Limits, program: str) -> Self:
        """Raises Unavailable where it does not start."""
        try:
            ours, theirs = socket.socketpair()
            with theirs:
                # A thread, because a large process takes milliseconds to start another.
                process = await asyncio.to_thread(_spawned, theirs, limits, program)
            ours.setblocking(False)
            decoder = cls(process, ours, limits)
            await decoder._become_ready()
        except OSError as error:
            raise Unavailable("a decoder of images does not start; try again later") from error
        return decoder

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """End it at once, whatever it does."""
        self._connection.close()
        self._process.kill()

    async def end(self) -> None:
        """End it, and wait until it is gone."""
        self.kill()
        # What the kernel holds on to ends when it can.
        with suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self._process.wait, _END_SECONDS)

    async def decode(self, data: bytes, window: str | None, frame: int | None) -> NDArray[np.uint8]:
        """Raises ValueError for what the file is to blame for, and _NotReceived."""
        self.idle = False
        limits = self._limits
        try:
            async with asyncio.timeout(limits.decode_seconds):
                await self._send(data, window, frame)
                decoded = await self._decoded()
        except TimeoutError:
            raise Mistake(
                f"the image needs more than {limits.decode_seconds:g} s to decode; make it smaller, or save it as PNG"
            ) from None
        except OSError as error:
            raise Mistake(
                "the image could not be decoded: its decoder ended; save it as PNG with another program"
            ) from error
        self.idle = True
        if isinstance(decoded, Mistake):
            raise decoded
        return decoded

    async def _become_ready(self) -> None:
        try:
            async with asyncio.timeout(_START_SECONDS):
                await self._read(READY)
        except OSError:
            await self.end()
            raise

    async def _send(self, data: bytes, window: str | None, frame: int | None) -> None:
        text = b"" if window is None else window.encode()
        header = REQUEST.pack(len(text), -1 if frame is None else min(frame, _LAST_FRAME), len(data))
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_sendall(self._connection, header + text)
            await loop.sock_sendall(self._connection, data)
            await self._read(RECEIVED)
        except OSError as error:
            raise _NotReceived from error

    async def _decoded(self) -> NDArray[np.uint8] | Mistake:
        """The answer. Raises OSError where the decoder ends, or says what it cannot."""
        kind, first, second = await self._read(PIXELS, REFUSED, EXHAUSTED)
        if kind == EXHAUSTED:
            # It has ended itself.
            raise Mistake(
                f"the image needs more than {self._limits.decode_mib} MiB to decode; make it smaller, or save it as PNG"
            )
        if kind == REFUSED:
            sentence = bytearray(_bounded(first, SENTENCE))
            await self._fill(memoryview(sentence))
            return Mistake(_printable(sentence.decode(errors="replace")))
        _bounded(first * second, self._limits.image_megapixels * 1_000_000)
        pixels = np.empty((first, second, 3), dtype=np.uint8)
        await self._fill(pixels.data.cast("B"))
        return pixels

    async def _read(self, *kinds: int) -> tuple[int, int, int]:
        """The next answer, of one of these kinds."""
        answer = bytearray(ANSWER.size)
        await self._fill(memoryview(answer))
        kind, first, second = ANSWER.unpack(answer)
        if kind not in kinds:
            raise ConnectionError(f"the decoder answers {kind}")
        return kind, first, second

    async def _fill(self, view: memoryview) -> None:
        """Read as many bytes as a buffer holds, straight into it."""
        loop = asyncio.get_running_loop()
        while view:
            count = await loop.sock_recv_into(self._connection, view)
            if not count:
                raise ConnectionResetError("the decoder has ended")
            view = view[count:]


def _spawned(connection: socket.socket, limits: Limits, program: str) -> subprocess.Popen[bytes]:
    options = (limits.decode_mib, limits.image_megapixels, limits.decode_seconds)
    libraries = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    modules = {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    return subprocess.Popen(
        [sys.executable, "-P", program, *map(str, options)],
        stdin=connection.fileno(),
        stdout=connection.fileno(),
        env={**modules, **libraries, **_ENVIRONMENT},
        # Ctrl-C in a terminal is for the service, which still answers what is under way.
        start_new_session=True,
    )


def _bounded(number: int, most: int) -> int:
    if not 0 < number <= most:
        raise ConnectionError(f"the decoder announces {number}, of at most {most}")
    return number


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)


_Place = asyncio.Task[_Decoder]
