"""The service against its bare engines, over loopback: `python -m bench.serving`.

The bare engines are the vLLM engine and the expert in this process, asked one after another for each request, with
the image decoded beforehand in this process too. The service is `medreasoner serve` in processes of its own, asked over
HTTP. Both answer the same requests, on the same cores, one after the other.

median_overhead_ms: median milliseconds that a request of one client takes longer with the tiny model.
throughput_ratio: requests a second of the service divided by those of the bare engines, with 32 clients and a reasoner
    of 380 million random weights.
segment_ratio: median time of `/v1/segment` about an image that was sent before, divided by that of the expert's bare
    decode, with an expert of ViT-B's shape.
first_ratio: the first request's time divided by the tenth's.
decode_ms, reason_ms, segment_ms, http_ms: where the median request's milliseconds go, with the tiny model and one
    client; `http` is all that is neither decoding nor a model.
"""

import argparse
import asyncio
import io
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from bench.machine import processor
from bench.published_shapes import TINY_REASONER
from bench.rewards import table
from phantoms import rows
from umrg.masks import encode_rle

ROOT = Path(__file__).parents[1]
BOX = (200.0, 200.0, 600.0, 600.0)
CLIENTS = (1, 8, 32)
Call = Callable[[int], Awaitable[Any]]


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a number of clients saw."""

    seconds: tuple[float, ...]
    """Of each request, in the order of their ends."""
    elapsed: float
    """Of all of them."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def rate(self) -> float:
        """Requests a second."""
        return len(self.seconds) / self.elapsed

    def percentile(self, share: float) -> float:
        return float(np.percentile(self.seconds, share))


async def loaded(call: Call, clients: int, requests: int) -> Load:
    """Send requests, each client its next one when it has the answer to the last."""
    waiting, seconds = iter(range(requests)), []

    async def client() -> None:
        for i in waiting:
            began = time.monotonic()
            await call(i)
            seconds.append(time.monotonic() - began)

    began = time.monotonic()
    await asyncio.gather(*(client() for _ in range(clients)))
    return Load(seconds=tuple(seconds), elapsed=time.monotonic() - began)


def large_reasoner(folder: Path) -> Path:
    """A reasoner of 380 million random weights with the tiny one's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(TINY_REASONER)
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 2048, 5632, 8
    text.num_attention_heads, text.num_key_value_heads = 16, 4
    text.layer_types = ["full_attention"] * 8
    text.max_window_layers = 8
    text.rope_parameters["mrope_section"] = [16, 24, 24]
    vision.out_hidden_size = 2048
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    for path in TINY_REASONER.iterdir():
        if path.name not in ("config.json", "model.safetensors", "README.md"):
            shutil.copy(path, folder / path.name)
    return folder


def large_expert(folder: Path) -> Path:
    """An expert of ViT-B's shape with random weights."""
    import torch
    from safetensors.torch import save_file

    from actors.experts.sam import build_sam
    from actors.experts.sam_config import PUBLISHED_EXPERTS

    torch.manual_seed(0)
    config = PUBLISHED_EXPERTS["sam_vit_b"].config
    path = folder / "expert.safetensors"
    save_file(build_sam(config).state_dict(), path, metadata={"name": "sam_vit_b"})
    return path


def questions(count: int, side: int) -> list[tuple[bytes, str]]:
    """Phantoms as PNG, and queries about them."""
    found = []
    for each in rows(count, seed=0, modalities=["CT"], queries_per_image=1, size=side):
        row: Any = each
        found.append((row["images"][0]["bytes"], row["prompt"][0]["content"]))
    return found


@contextmanager
def served(*arguments: str) -> Iterator[tuple[str, float]]:
    """`medreasoner serve` with arguments: its address, and the seconds until it was up."""
    with tempfile.TemporaryFile("w+") as log:
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        began = time.monotonic()
        command = [sys.executable, "-m", "cluster.cli", "serve", "--port", "8377", *arguments]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while True:
                log.seek(0)
                if found := re.search(r"serving \S+ at (http://\S+);", text := log.read()):
                    break
                if process.poll() is not None or time.monotonic() - began > 400:
                    raise RuntimeError(f"the service did not start: {text[-2000:]}")
                time.sleep(0.2)
            yield found[1], time.monotonic() - began
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=120)


class Bare:
    """The engines in this process."""

    def __init__(self, model: Path, max_tokens: int, threads: int | None) -> None:
        self._model, self._max_tokens, self._threads = model, max_tokens, threads

    async def start(self) -> None:
        from actors.config import RolloutConfig, SegmenterConfig
        from actors.experts.drawing import load_frozen
        from actors.threads import share_cores
        from reasoner.prompter import load_prompter

        config = RolloutConfig(num_cpus=0.5, max_tokens=self._max_tokens, threads=self._threads)
        os.environ.update(config.process_environment)
        share_cores(self._threads, 1)
        from actors.engine import Engine

        self._engine = await Engine.start(self._model, load_prompter(self._model), config)
        self._expert = load_frozen("tiny", SegmenterConfig())

    async def ground(self, image: bytes, query: str) -> None:
        from actors.experts.drawing import draw_masks
        from umrg.answers import parse_answer
        from umrg.group import SamplingParams
        from umrg.images import decode_image

        pixels = decode_image(image, "the image")
        greedy = SamplingParams(n=1, temperature=0.0, max_tokens=self._max_tokens)
        samples = await self._engine.generate(pixels, query, greedy)
        frame = self._engine.prompter.prompt.frame
        answer = parse_answer(samples.completions[0].text).to_original(samples.frames, frame)
        await asyncio.to_thread(lambda: draw_masks(self._expert, self._expert.embed(pixels), [answer]))

    def stop(self) -> None:
        self._engine.stop()


async def bare_loads(
    model: Path, max_tokens: int, threads: int | None, asked: list[tuple[bytes, str]], counts: dict[int, int]
) -> Any:
    """A load by number of clients, of the bare engines."""
    bare = Bare(model, max_tokens, threads)
    await bare.start()
    try:
        for i in range(3):
            await bare.ground(*asked[-1 - i])
        return {n: await loaded(lambda i: bare.ground(*asked[i]), n, counts[n]) for n in counts}
    finally:
        bare.stop()


async def served_loads(address: str, asked: list[tuple[bytes, str]], counts: dict[int, int]) -> Any:
    """A load by number of clients, of the service; the seconds of its first ten requests; and the timings that the
    single client's answers tell."""
    timings: list[dict[str, float]] = []
    async with httpx.AsyncClient(base_url=address, timeout=300, limits=httpx.Limits(max_connections=64)) as client:

        async def ground(i: int) -> None:
            image, query = asked[i]
            reply = await client.post("/v1/ground", files={"image": image}, data={"query": query})
            reply.raise_for_status()
            timings.append(reply.json()["timings"])

        first = await loaded(lambda i: ground(-1 - i), 1, 10)
        timings.clear()
        loads: dict[int, Load] = {}
        single: list[dict[str, float]] = []
        for n, requests in counts.items():
            loads[n] = await loaded(ground, n, requests)
            single = single or list(timings)
    return loads, first.seconds, single


def report(title: str, bare: dict[int, Load], service: dict[int, Load]) -> None:
    lines = [
        [
            f"{n} clients",
            *(f"{1e3 * value:.0f}" for load in (bare[n], service[n]) for value in quartet(load)),
            f"{bare[n].rate:.2f}",
            f"{service[n].rate:.2f}",
            f"{service[n].rate / bare[n].rate:.2f}",
        ]
        for n in bare
    ]
    print(f"\n{title}: milliseconds (median, 90 %, 99 %) of the bare engines and of the service, requests a second")
    print(table([["", "bare", "90 %", "99 %", "served", "90 %", "99 %", "bare/s", "served/s", "ratio"], *lines]))


def quartet(load: Load) -> tuple[float, float, float]:
    return load.median, load.percentile(90), load.percentile(99)


def tiny_part(requests: int) -> dict[str, float]:
    """The service's own cost: the tiny model's answers take little."""
    asked, counts = questions(requests, 224), {1: requests // 4, 8: requests // 2, 32: requests - 16}
    bare = asyncio.run(bare_loads(TINY_REASONER, 512, 1, asked, counts))
    with served(str(TINY_REASONER), "rollout.threads=1") as (address, up):
        service, first, single = asyncio.run(served_loads(address, asked, counts))
    report("tiny reasoner and expert", bare, service)
    stages = {name: 1e3 * statistics.median(each[name] for each in single) for name in ("decode", "reason", "segment")}
    http_ms = 1e3 * service[1].median - sum(stages.values())
    return {
        "up_s": up,
        "first_ratio": first[0] / first[9],
        "median_overhead_ms": 1e3 * (service[1].median - bare[1].median),
        **{f"{name}_ms": value for name, value in stages.items()},
        "http_ms": http_ms,
    }


def large_part(requests: int) -> dict[str, float]:
    """Throughput where the reasoner is what takes time."""
    asked, counts = questions(requests, 224), {1: 2, 8: 16, 32: requests}
    with tempfile.TemporaryDirectory() as folder:
        model = large_reasoner(Path(folder))
        bare = asyncio.run(bare_loads(model, 32, None, asked, counts))
        with served(str(model), "rollout.max_tokens=32") as (address, _):
            service, _, _ = asyncio.run(served_loads(address, asked, counts))
    report("380 M random weights, 32 tokens", bare, service)
    return {"throughput_ratio": service[32].rate / bare[32].rate}


def segment_part(requests: int) -> dict[str, float]:
    """A box that is dragged over an image: its embedding is kept, and only the decoder runs."""
    from actors.config import SegmenterConfig
    from actors.experts.drawing import load_frozen
    from actors.threads import share_cores

    share_cores(None, 1)
    picture = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (840, 840, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(picture, "PNG")
    with tempfile.TemporaryDirectory() as folder:
        expert_file = large_expert(Path(folder))
        expert = load_frozen(str(expert_file), SegmenterConfig())
        embedding = expert.embed(pixels)

        async def decode(i: int) -> None:
            encode_rle(expert.decode(embedding, boxes=np.array([[edge + i for edge in BOX]])).masks[0])

        asyncio.run(loaded(decode, 1, 3))
        bare = asyncio.run(loaded(decode, 1, requests))
        with served(str(TINY_REASONER), "--expert", str(expert_file)) as (address, _):
            service = asyncio.run(dragged(address, picture.getvalue(), requests))
    report("a box dragged, ViT-B", {1: bare}, {1: service})
    return {"segment_ratio": service.median / bare.median, "bare_decode_ms": 1e3 * bare.median}


async def dragged(address: str, image: bytes, requests: int) -> Load:
    async with httpx.AsyncClient(base_url=address, timeout=300) as client:
        reply = await client.post("/v1/segment", files={"image": image}, data={"box": "1,1,50,50"})
        image_id = reply.raise_for_status().json()["image_id"]

        async def drag(i: int) -> None:
            body = {"image_id": image_id, "box": [edge + i for edge in BOX]}
            (await client.post("/v1/segment", json=body)).raise_for_status()

        await loaded(drag, 1, 3)
        return await loaded(drag, 1, requests)


PARTS = {"tiny": (tiny_part, 128), "large": (large_part, 96), "segment": (segment_part, 60)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="one part, or several; all by default")
    chosen = parser.parse_args().part or list(PARTS)
    figures: dict[str, Any] = {"processor": processor()}
    for name in chosen:
        part, requests = PARTS[name]
        figures |= {key: round(value, 3) for key, value in part(requests).items()}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
