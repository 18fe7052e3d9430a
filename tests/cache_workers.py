"""Processes that read and write one folder of embeddings until they are killed, and the embeddings that they expect."""

import logging
import os
import random
from pathlib import Path

import torch

from actors.experts.cache import EmbeddingCache
from actors.experts.protocol import Embedding
from actors.experts.store import EmbeddingStore, rounded
from umrg.frames import Size

KEYS = 60


def embedding_of(key: int, *, side: int = 16) -> Embedding:
    """The one embedding that this key may have, of two levels: about 40 side² bytes in float16."""
    drawn = torch.Generator().manual_seed(key)
    shapes = (1, 4 + key % 5, side, side), (1, 3, 2 * side, 2 * side)
    features = tuple(torch.randn(shape, generator=drawn) for shape in shapes)
    return Embedding(features=features, original=Size(100 + key, 50), content=Size(1024, 512))


def alike(one: Embedding, other: Embedding) -> bool:
    """Whether two embeddings are the same, bit for bit."""
    same = (one.original, one.content) == (other.original, other.content)
    features = zip(one.features, other.features, strict=True)
    return same and all(a.dtype == b.dtype and a.shape == b.shape and a.equal(b) for a, b in features)


def work(folder: Path, limit: int, told: Path) -> None:
    """Read and write embeddings at random, for ever; whatever is wrong is appended to the file `told`, as a line."""
    torch.set_num_threads(1)
    chosen = random.Random(os.getpid())
    logging.basicConfig(filename=told, format="%(message)s")
    while True:
        # What is in memory was checked already: most of what is asked for should come from the disk.
        cache = EmbeddingCache(limit=20_000, store=EmbeddingStore(folder, limit=limit, fingerprint="f"))
        for _ in range(50):
            key = chosen.randrange(KEYS)
            found = cache.get(f"{key}") or cache.put(f"{key}", embedding_of(key))
            if not alike(found, rounded(embedding_of(key))):
                logging.warning("another embedding than that of %d", key)
