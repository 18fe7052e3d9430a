"""The service against its bare engines, over loopback: `python -m bench.serving`.

The bare engines are the vLLM engine and the expert in this process, asked one after another for each request, with
the image decoded in this process too. The service is `medreasoner serve` in processes of its own, asked over HTTP. Both
are up all the time, answer the same requests, and take turns, on the same cores and at the priority of Ray's workers.

median_overhead_ms: of one client with the tiny model the median of how many milliseconds longer a request takes at the
    service than the same one at the bare engines, some seconds before.
throughput_ratio: requests a second of the service divided by those of the bare engines, with 32 clients and a reasoner
    of 380 million random weights.
segment_ratio: median time of `/v1/segment` about an image that was sent before, divided by that of the expert's bare
    decode, with an expert of ViT-B's shape. segment_overhead_ms: the difference.
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

ROOT = Path(__file__).parents[1]
BOX = (200.0, 200.0, 600.0, 600.0)
RAYS_NICENESS = 15
"""Of Ray's workers, and with them of the service's engines."""
PAUSE = 3.0
"""Seconds."""
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


async def loaded(call: Call, clients: int, requests: int, start: int = 0) -> Load:
    """Send requests, each client its next one when it has the answer to the last. start: number of the first."""
    waiting, seconds = iter(range(start, start + requests)), []

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
    from actors.experts.sam_config import VIT_B

    torch.manual_seed(0)
    path = folder / "expert.safetensors"
    save_file(build_sam(VIT_B).state_dict(), path, metadata={"name": "sam_vit_b"})
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


async def in_turn(bare: Call, service: Call, clients: int, requests: int, rounds: int) -> tuple[Load, Load]:
    """The loads of both, a round of each after one of the other."""
    each, parts = max(clients, requests // rounds), []
    for start in range(0, rounds * each, each):
        part = []
        for call in (bare, service):
            # Engines look for work for a while before they sleep, on cores that the other needs.
            await asyncio.sleep(PAUSE)
            part.append(await loaded(call, clients, each, start))
        parts.append(part)
    first, second = (
        Load(
            seconds=tuple(second for part in parts for second in part[i].seconds),
            elapsed=sum(part[i].elapsed for part in parts),
        )
        for i in range(2)
    )
    return first, second


class Served:
    """The service, and what its answers tell."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self.timings: list[dict[str, float]] = []

    async def ground(self, image: bytes, query: str) -> None:
        reply = await self._client.post("/v1/ground", files={"image": image}, data={"query": query})
        reply.raise_for_status()
        self.timings.append(reply.json()["timings"])


async def compared(
    address: str, bare: Bare, asked: list[tuple[bytes, str]], counts: dict[int, tuple[int, int]]
) -> tuple[dict[int, tuple[Load, Load]], tuple[float, ...], list[dict[str, float]]]:
    """Loads of bare engines and service by number of clients; the seconds of the service's first ten requests; and the
    timings that a single client's answers tell. counts: requests and rounds by number of clients."""
    await bare.start()
    try:
        async with httpx.AsyncClient(base_url=address, timeout=300, limits=httpx.Limits(max_connections=64)) as client:
            service = Served(client)
            bare_call, service_call = (
                lambda i, ground=ground: ground(*asked[i % len(asked)]) for ground in (bare.ground, service.ground)
            )
            first = await loaded(service_call, 1, 10, start=len(asked) - 10)
            await loaded(bare_call, 1, 10, start=len(asked) - 10)
            service.timings.clear()
            loads: dict[int, tuple[Load, Load]] = {}
            single: list[dict[str, float]] = []
            for n, (requests, rounds) in counts.items():
                loads[n] = await in_turn(bare_call, service_call, n, requests, rounds)
                single = single or list(service.timings)
        return loads, first.seconds, single
    finally:
        bare.stop()


def report(title: str, loads: dict[int, tuple[Load, Load]]) -> None:
    lines = [
        [
            f"{n} clients",
            *(f"{1e3 * value:.0f}" for load in (bare, service) for value in quantiles(load)),
            f"{bare.rate:.2f}",
            f"{service.rate:.2f}",
            f"{service.rate / bare.rate:.2f}",
        ]
        for n, (bare, service) in loads.items()
    ]
    print(f"\n{title}: milliseconds (median, 90 %, 99 %) of the bare engines and of the service, requests a second")
    print(table([["", "bare", "90 %", "99 %", "served", "90 %", "99 %", "bare/s", "served/s", "ratio"], *lines]))


def quantiles(load: Load) -> tuple[float, float, float]:
    return load.median, load.percentile(90), load.percentile(99)


def tiny_part() -> dict[str, float]:
    """The service's own cost: the tiny model's answers take little."""
    asked = questions(64, 224)
    with served(str(TINY_REASONER), "rollout.threads=1") as (address, up):
        bare = Bare(TINY_REASONER, 512, threads=1)
        counts = {1: (48, 6), 8: (128, 2), 32: (128, 2)}
        loads, first, single = asyncio.run(compared(address, bare, asked, counts))
    report("tiny reasoner and expert", loads)
    stages = {name: 1e3 * statistics.median(each[name] for each in single) for name in ("decode", "reason", "segment")}
    alone, service = loads[1]
    differences = [after - before for before, after in zip(alone.seconds, service.seconds, strict=True)]
    return {
        "up_s": up,
        "first_ratio": first[0] / first[9],
        "median_overhead_ms": 1e3 * statistics.median(differences),
        **{f"{name}_ms": value for name, value in stages.items()},
        "http_ms": 1e3 * service.median - sum(stages.values()),
    }


def large_part() -> dict[str, float]:
    """Throughput where the reasoner is what takes time."""
    asked = questions(64, 224)
    with tempfile.TemporaryDirectory() as folder:
        model = large_reasoner(Path(folder))
        with served(str(model), "rollout.max_tokens=32") as (address, _):
            bare = Bare(model, 32, threads=None)
            loads, _, _ = asyncio.run(compared(address, bare, asked, {1: (4, 2), 8: (16, 1), 32: (128, 2)}))
    report("380 M random weights, 32 tokens", loads)
    return {"throughput_ratio": loads[32][1].rate / loads[32][0].rate}


def segment_part() -> dict[str, float]:
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
            expert.decode(embedding, boxes=np.array([[edge + i for edge in BOX]]))

        with served(str(TINY_REASONER), "rollout.threads=1", "--expert", str(expert_file)) as (address, _):
            bare, service = asyncio.run(dragged(address, picture.getvalue(), decode))
    report("a box dragged, ViT-B", {1: (bare, service)})
    difference = 1e3 * (service.median - bare.median)
    return {"segment_ratio": service.median / bare.median, "segment_overhead_ms": difference}


async def dragged(address: str, image: bytes, decode: Call) -> tuple[Load, Load]:
    async with httpx.AsyncClient(base_url=address, timeout=300) as client:
        reply = await client.post("/v1/segment", files={"image": image}, data={"box": "1,1,50,50"})
        image_id = reply.raise_for_status().json()["image_id"]

        async def drag(i: int) -> None:
            body = {"image_id": image_id, "box": [edge + i for edge in BOX]}
            (await client.post("/v1/segment", json=body)).raise_for_status()

        await in_turn(decode, drag, 1, 6, 2)
        return await in_turn(decode, drag, 1, 80, 4)


PARTS = {"tiny": tiny_part, "large": large_part, "segment": segment_part}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="one part, or several; all by default")
    chosen = parser.parse_args().part or list(PARTS)
    os.nice(RAYS_NICENESS)
    figures: dict[str, Any] = {"processor": processor()}
    for name in chosen:
        figures |= {key: round(value, 3) for key, value in PARTS[name]().items()}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
