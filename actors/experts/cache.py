"""Embeddings of images that an actor used last, in memory and, where asked, on a disk that the actors of a node share.

Nothing here imports torch, but for a cache that is opened with a folder.
"""

import logging
import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

from actors.config import EmbeddingsConfig
from actors.experts.protocol import Embedding, Expert

if TYPE_CHECKING:
    from actors.experts.store import EmbeddingStore

REST_S = 60.0
"""Seconds for which nothing is written after a write has failed."""

_log = logging.getLogger(__name__)


class EmbeddingCache:
    """The embeddings that were used last, bounded by the bytes of their features.

    limit: those bytes in main memory; an embedding that is larger is not kept there. store: where all of them are kept
    besides. A disk that fails is told once, as a warning, and the cache goes on in memory; it tries again to write
    after a minute. Methods may be called by several threads at once.
    """

    def __init__(self, *, limit: int, store: "EmbeddingStore | None" = None) -> None:
        self.limit, self._store = limit, store
        self._kept: OrderedDict[str, Embedding] = OrderedDict()
        self._lock = threading.Lock()
        self._warned = False
        self._write_again = 0.0
        self.bytes = 0
        """Of all that are kept in memory."""
        self.hits = 0
        self.misses = 0
        self.read = 0
        """Hits that came from the disk."""

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def on_disk(self) -> bool:
        """Whether embeddings are kept on a disk besides."""
        return self._store is not None

    def get(self, key: str) -> Embedding | None:
        """What was put by that key, from memory or else from disk; counts as its use, and as a hit or a miss."""
        with self._lock:
            if (kept := self._kept.get(key)) is not None:
                self.hits += 1
                self._kept.move_to_end(key)
                return kept
        read = self._read(key)
        with self._lock:
            if read is None:
                self.misses += 1
            else:
                self.hits += 1
                self.read += 1
                self._keep(key, read)
        return read

    def put(self, key: str, embedding: Embedding) -> Embedding:
        """Keep an embedding; returns what is to be used from now on, in main memory.

        Without a disk, that is the embedding as it is. With one, it is in float16, whether or not it could be written,
        so that no reward depends on where an embedding came from; and it is another process's, where that has
        stored the same image meanwhile. Raises ValueError where a value does not fit into float16.
        """
        used = in_memory(embedding) if self._store is None else self._stored(key, embedding, self._store)
        with self._lock:
            self._keep(key, used)
        return used

    def _keep(self, key: str, embedding: Embedding) -> None:
        """In place of those that were used longest ago, as far as there is no room for it."""
        if key in self._kept:
            self.bytes -= self._kept.pop(key).nbytes
        if embedding.nbytes > self.limit:
            return
        self._kept[key] = embedding
        self.bytes += embedding.nbytes
        while self.bytes > self.limit:
            _, oldest = self._kept.popitem(last=False)
            self.bytes -= oldest.nbytes

    def _read(self, key: str) -> Embedding | None:
        if self._store is None:
            return None
        try:
            return self._store.get(key)
        except OSError as error:
            self._warn(error)
            return None

    def _stored(self, key: str, embedding: Embedding, store: "EmbeddingStore") -> Embedding:
        from actors.experts.store import rounded

        used = rounded(embedding)
        if time.monotonic() < self._write_again:
            return used
        try:
            if not store.put(key, used):
                return store.get(key) or used
        except OSError as error:
            self._warn(error)
            self._write_again = time.monotonic() + REST_S
        return used

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            _log.warning("embeddings are kept in memory alone, for the disk fails: %s", error)


def in_memory(embedding: Embedding) -> Embedding:
    """The same embedding in main memory."""
    return Embedding(
        features=tuple(each.cpu() for each in embedding.features),
        original=embedding.original,
        content=embedding.content,
    )


def open_cache(config: EmbeddingsConfig, expert: Expert) -> EmbeddingCache:
    """The cache of an expert's embeddings that a configuration asks for."""
    limit = config.memory_mib << 20
    if config.folder is None:
        return EmbeddingCache(limit=limit)
    from actors.experts.store import EmbeddingStore

    store = EmbeddingStore(config.folder, limit=config.disk_gib << 30, fingerprint=expert.fingerprint())
    return EmbeddingCache(limit=limit, store=store)
