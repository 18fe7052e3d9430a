"""What a decoder may do: little, and nothing that it says is believed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from serving import decoder_process
from serving.decoder_process import ANSWER, EXHAUSTED, READY, RECEIVED, REFUSED
from serving.messages import Unavailable
from tests.conftest import ROOT
from tests.decoders import DOT, SECONDS, black, decoded, living, pool, refused, run, until


@pytest.mark.parametrize("busy", [False, True])
def test_decoders_end_with_their_parent(busy, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import asyncio, sys, psutil\n"
        "from serving.config import Limits\n"
        "from serving.decoding import Decoders\n"
        "async def main():\n"
        "    decoders = Decoders(2, Limits())\n"
        "    await decoders.start()\n"
        "    task = asyncio.create_task(decoders.decode(open(sys.argv[1], 'rb').read(), window=None, frame=None))\n"
        "    await asyncio.sleep(0.2)\n"
        "    print(*(child.pid for child in psutil.Process().children()), flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    file = tmp_path / "image.png"
    file.write_bytes(black(9000, 9000, 2) if busy else DOT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, script, file], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        decoders = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        parent.send_signal(signal.SIGKILL)
    assert len(decoders) == 2
    _, alive = psutil.wait_procs(decoders, timeout=SECONDS)
    assert not alive


def test_a_decoder_has_neither_secrets_nor_files(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")

    async def test() -> None:
        async with pool(2):
            for decoder in living():
                assert "AWS_SECRET_ACCESS_KEY" not in decoder.environ()
                assert not decoder.open_files()
                for limit in (psutil.RLIMIT_NOFILE, psutil.RLIMIT_CORE):
                    assert decoder.rlimit(limit) == (0, 0)
                assert decoder.rlimit(psutil.RLIMIT_AS) == (2048 << 20,) * 2
                assert decoder.memory_info().rss < 200 << 20

    run(test())


SUBVERTED = {
    "huge": (decoder_process.PIXELS, 2**31, 2**31, b""),
    "nothing": (decoder_process.PIXELS, 0, 5, b""),
    "short": (decoder_process.PIXELS, 20, 30, b"12345"),
    "longwinded": (REFUSED, 2**31, 0, b""),
    "nonsense": (77, 0, 0, b""),
    "again": (READY, 0, 0, b""),
    "pickle": (ord("c"), 0, 0, b"os\nsystem\n(S'touch subverted'\ntR."),
}


@pytest.mark.parametrize("name", SUBVERTED)
def test_nothing_that_a_subverted_decoder_says_is_believed(name, tmp_path):
    kind, first, second, rest = SUBVERTED[name]
    program = answering(tmp_path, ANSWER.pack(kind, first, second) + rest)

    async def test() -> None:
        async with pool(program=program, image_megapixels=1) as decoders:
            assert "its decoder ended" in await refused(decoders, DOT)

    run(test())
    assert not Path("subverted").exists()


def test_what_a_subverted_decoder_writes_is_printable(tmp_path):
    sentence = b"\x1b[31mgone\r\nHTTP/1.1 200\xff"
    program = answering(tmp_path, ANSWER.pack(REFUSED, len(sentence), 0) + sentence)

    async def test() -> None:
        async with pool(program=program) as decoders:
            assert await refused(decoders, DOT) == " [31mgone  HTTP/1.1 200\N{REPLACEMENT CHARACTER}"

    run(test())


def test_a_decoder_that_says_that_memory_ends_is_replaced(tmp_path):
    async def test() -> None:
        async with pool(program=answering(tmp_path, ANSWER.pack(EXHAUSTED, 0, 0))) as decoders:
            (before,) = living()
            assert "needs more than 2048 MiB" in await refused(decoders, DOT)
            await until(lambda: bool(living()) and living() != [before])

    run(test())


def test_decoders_that_end_before_they_read_are_not_tried_for_ever(tmp_path):
    program = tmp_path / "fleeting.py"
    program.write_text(f"import os; os.write(1, {ANSWER.pack(READY, 0, 0)!r}); os.read(0, 1)")

    async def test() -> None:
        async with pool(program=program) as decoders:
            with pytest.raises(Unavailable, match="end before they have read"):
                await decoded(decoders, DOT)

    run(test())


def answering(folder: Path, answer: bytes) -> Path:
    """A decoder that is ready, receives `DOT`, and answers so."""
    program = folder / "subverted.py"
    ready, received = (ANSWER.pack(kind, 0, 0) for kind in (READY, RECEIVED))
    program.write_text(
        f"import os\nos.write(1, {ready!r})\nread = b''\n"
        f"while not read.endswith({DOT[-12:]!r}):\n    read += os.read(0, 65536)\n"
        f"os.write(1, {received + answer!r})\n"
    )
    return program
