"""Decodes images in a process of its own, which a hostile or damaged file may take down without harm.

`serving.decoding` starts it and speaks with it through stdin and stdout:

    request   REQUEST, the window as text, the file
    answers   READY, once; then for each request RECEIVED, and PIXELS with the bytes of uint8 [H, W, 3],
              REFUSED with a sentence, or EXHAUSTED

Nothing in either direction is unpickled. It ends with its parent, whose end closes stdin, and nothing that it prints is
shown once it is ready.
"""

import math
import os
import resource
import struct
import sys
from typing import BinaryIO

REQUEST = struct.Struct(">IqQ")
"""Bytes of the window, or 0 for none; the frame, or -1 for none; bytes of the file."""
ANSWER = struct.Struct(">BII")
"""The kind; for PIXELS height and width, for REFUSED the sentence's bytes and 0, otherwise 0 and 0."""
READY, RECEIVED, PIXELS, REFUSED, EXHAUSTED = range(5)
SENTENCE = 4096
"""Most bytes of a sentence."""
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP")
"""The formats that the service reads, by Pillow's names."""

# The smallest PNG, one black pixel: to decode it loads what every image needs.
_DOT = bytes.fromhex(
    "89504e470d0a1a0a0000000d494844520000000100000001080000000"
    "03a7e9b550000000a49444154789c636000000002000148afa471000000"
    "0049454e44ae426082"
)


def main(mib: int, megapixels: int, seconds: float) -> None:
    """Answer requests until stdin ends. mib: most memory. megapixels: largest image. seconds: of processor time for
    each image."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (mib << 20, mib << 20))
    _load(megapixels)
    asked, answered = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    # From here on it can open neither file nor socket.
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    _send(answered, READY)
    while header := asked.read(REQUEST.size):
        window, frame, size = REQUEST.unpack(header)
        # A file of which only a part came is none: the parent is gone.
        text, file = asked.read(window).decode(), asked.read(size)
        if len(file) < size:
            return
        _send(answered, RECEIVED)
        _allow(seconds)
        if not _answer(answered, file, text or None, None if frame < 0 else frame):
            return


def _load(megapixels: int) -> None:
    """Import everything that a file may need, now that memory is limited."""
    from PIL import Image, ImageCms, ImagePalette, JpegImagePlugin, MpoImagePlugin, TiffImagePlugin, WebPImagePlugin

    from umrg.images import decode_image

    assert ImageCms and ImagePalette and JpegImagePlugin and MpoImagePlugin and TiffImagePlugin and WebPImagePlugin
    Image.MAX_IMAGE_PIXELS = megapixels * 1_000_000
    decode_image(_DOT, "the image", formats=FORMATS)


def _allow(seconds: float) -> None:
    """So much processor time from now on. The parent ends what lasts too long; this is for a parent that cannot."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    until = math.ceil(usage.ru_utime + usage.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (until, resource.RLIM_INFINITY))


def _answer(answered: BinaryIO, file: bytes, window: str | None, frame: int | None) -> bool:
    """Decode a file and send what came of it; whether this process can decode another."""
    from umrg.images import decode_image
    from umrg.mistake import Mistake
    from umrg.windowing import Window

    try:
        levels = None if window is None else Window.parse(window)
        pixels = decode_image(file, "the image", window=levels, frame=frame, formats=FORMATS)
    except Mistake as error:
        if _of_memory(error):
            _send(answered, EXHAUSTED)
            return False
        sentence = str(error).encode(errors="replace")[:SENTENCE]
        _send(answered, REFUSED, len(sentence), 0, sentence)
    else:
        height, width = pixels.shape[:2]
        _send(answered, PIXELS, height, width, pixels.data.cast("B"))
    return True


def _of_memory(error: BaseException) -> bool:
    """Whether the decoding ended for lack of memory, which Pillow's own decoders report as an OSError."""
    cause = error.__cause__
    return isinstance(cause, MemoryError) or (isinstance(cause, OSError) and "out of memory" in str(cause))


def _send(answered: BinaryIO, kind: int, first: int = 0, second: int = 0, rest: bytes | memoryview = b"") -> None:
    answered.write(ANSWER.pack(kind, first, second))
    answered.write(rest)
    answered.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
