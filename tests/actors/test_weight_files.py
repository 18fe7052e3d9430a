"""Weights on their way: buckets, their files in memory, and the checksums that show they are the same."""

import asyncio
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from actors.rollout import Rollout
from actors.weight_files import Checksum, FolderWeights, HostFile, checksum_of, mapped, pack, unpack, word_sum

TENSORS = {
    "a": torch.randn(3, 4),
    "b": torch.randn(5).to(torch.bfloat16),
    "c": torch.tensor(2.0),
    "d": torch.arange(7, dtype=torch.int64),
    "e": torch.randn(4, 6).T,
}


def equal(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in expected.items()
    )


def test_tensors_come_back_bit_by_bit():
    assert equal(unpack(pack(TENSORS)), TENSORS)


def test_a_file_in_memory_shows_them_without_a_copy_and_leaves_nothing():
    bucket = pack(TENSORS)
    with HostFile() as file:
        file.write(bucket)
        found = mapped(file.path, bucket.entries)
        assert equal(found, TENSORS)
    assert not os.path.exists(file.path)
    assert equal(found, TENSORS), "tensors keep their memory"
    found["a"].zero_()  # may be written to, as torch expects, without an effect on anybody else


def test_one_bucket_takes_the_place_of_another_in_the_same_memory():
    large, small = ({"a": torch.full((size,), float(size))} for size in (1 << 20, 10))
    with HostFile() as file:
        for tensors in (small, large, small):
            file.write(bucket := pack(tensors))
            assert equal(mapped(file.path, bucket.entries), tensors)
        assert os.path.getsize(file.path) == 4 << 20


HELD = """
import os, sys, torch
from actors.weight_files import HostFile, pack
with HostFile() as file:
    file.write(pack({"a": torch.ones(1 << 20)}))
    print(file.path, flush=True)
    sys.stdin.read()
"""


def test_another_process_reads_it_and_a_killed_one_leaves_nothing():
    """As vLLM's worker reads what a rollout wrote. The file has no name, so there is nothing to clean up."""
    before = set(os.listdir("/dev/shm"))
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", HELD], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        path = writer.stdout.readline().strip()
        found = mapped(path, pack({"a": torch.ones(1 << 20)}).entries)
        writer.kill()
        writer.wait(timeout=30)
    assert found["a"].sum() == 1 << 20
    assert not os.path.exists(path) and set(os.listdir("/dev/shm")) <= before


def test_the_checksum_sees_names_values_types_and_shapes():
    tensor = torch.arange(4, dtype=torch.float32)
    others = [
        {"b": tensor},
        {"a": tensor + 1e-7},
        {"a": tensor.to(torch.float64)},
        {"a": tensor.view(2, 2)},
        {"a": tensor, "b": tensor},
    ]
    sums = {checksum_of([bucket]) for bucket in ({"a": tensor}, *others)}
    assert len(sums) == 1 + len(others)


def test_sha256_sees_numbers_that_change_places():
    tensor = torch.arange(8, dtype=torch.float32)
    moved = tensor.view(4, 2).flip(0).reshape(-1)
    for exact in (False, True):
        found = []
        for each in (tensor, moved):
            (checksum := Checksum()).add({"a": each}, exact=exact)
            found.append(checksum.hexdigest())
        assert (found[0] != found[1]) is exact


def test_the_checksum_of_buckets_is_that_of_one_after_another_in_any_order():
    checksum = Checksum()
    checksum.add({"b": torch.zeros(2)})
    checksum.add({"a": torch.ones(2)})
    assert checksum.hexdigest() == checksum_of([{"a": torch.ones(2), "b": torch.zeros(2)}])


@given(sizes=st.lists(st.integers(1, 9).map(lambda n: 4 * n), min_size=1, max_size=4), padding=st.integers(0, 3))
def test_the_sum_of_words_survives_fusion_and_padding(sizes, padding):
    """As an engine fuses q, k and v, and pads its embedding with rows of zeros."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(size, 2, generator=generator).to(torch.bfloat16) for size in sizes]
    fused = torch.cat([*parts, torch.zeros(padding, 2, dtype=torch.bfloat16)])
    assert word_sum(fused) == sum(map(word_sum, parts)) % (1 << 64)


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_a_sum_of_words_needs_no_alignment(offset):
    whole = torch.randn(40).to(torch.bfloat16)
    part = whole[offset : offset + 9]
    assert word_sum(part) == word_sum(part.clone())


def test_a_receiving_actor_holds_two_buckets_at_most(ray_cluster):
    """One in the object store, of which its process sees a view, and one in the file for the engine. Nothing of the
    size of a bucket is on its heap."""

    class Measuring:
        """In place of the engine: it takes the buckets as the real one does, and measures."""

        async def update_weights(self, buckets, version):
            tracemalloc.start()
            total = 0
            with HostFile() as file:
                async for bucket in buckets:
                    file.write(bucket)
                    total += sum(int(each.sum()) for each in mapped(file.path, bucket.entries).values())
                    assert os.path.getsize(file.path) == size, "one bucket is in the file"
            return total, tracemalloc.get_traced_memory()[1]

        async def check_health(self):
            pass

    class Receiver(Rollout):
        def __init__(self):
            self._engine: Any = Measuring()

    size, count = 32 << 20, 6
    refs = [ray.put(pack({"a": torch.from_numpy(np.ones(size, dtype=np.uint8))})) for _ in range(count)]
    actor = ray.remote(Receiver).options(num_cpus=0).remote()
    try:
        total, peak = ray.get(actor.update_weights.remote(1, refs), timeout=120)
    finally:
        ray.kill(actor)
    assert total == size * count
    assert peak < size / 4, "a bucket was copied to the heap"


IN_FILES = {name: tensor.contiguous() for name, tensor in TENSORS.items()}


def single(folder):
    save_file(IN_FILES, folder / "model.safetensors")


def sharded(folder):
    """With a file beside them that the index does not name."""
    save_file({"z": torch.zeros(3)}, folder / "model.safetensors")
    shards = {"first.safetensors": ("a", "b", "c"), "second.safetensors": ("d", "e")}
    for file, names in shards.items():
        save_file({name: IN_FILES[name] for name in names}, folder / file)
    places = {name: file for file, names in shards.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def read(weights):
    async def all_of_them():
        return [bucket async for bucket in weights.buckets()]

    return asyncio.run(all_of_them())


@pytest.mark.parametrize("write", [single, sharded])
@pytest.mark.parametrize("most", [1, 60, 1 << 30])
def test_a_folder_s_weights_come_in_buckets_with_the_checksum_of_them_all(tmp_path, write, most):
    write(tmp_path)
    weights = FolderWeights(tmp_path, most=most)
    buckets = read(weights)
    found = [unpack(bucket) for bucket in buckets]
    assert equal({name: tensor for bucket in found for name, tensor in bucket.items()}, IN_FILES)
    assert sum(map(len, found)) == len(IN_FILES) and weights.checksum() == checksum_of(found)
    for bucket in buckets:
        assert len(bucket.arrays) == 1 or sum(array.nbytes for array in bucket.arrays) <= most


def test_a_bucket_is_read_when_it_is_asked_for(tmp_path):
    single(tmp_path)
    weights = FolderWeights(tmp_path, most=1)

    async def first():
        buckets = weights.buckets()
        return await anext(buckets)

    bucket = asyncio.run(first())
    assert weights.checksum() == checksum_of([unpack(bucket)])
