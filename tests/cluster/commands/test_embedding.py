"""`medreasoner expert embed`: what it writes, skips and says."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from actors.config import EmbeddingsConfig
from actors.experts.cache import open_cache
from actors.experts.protocol import Embedding
from actors.experts.registry import load_expert
from actors.experts.store import EmbeddingStore, rounded
from cluster.cli import app, run_command
from cluster.commands.embedding import Costs, Filled, embed_dataset
from phantoms import rows
from umrg.dataset import Dataset, write_rows
from umrg.frames import Size

GIB = 1 << 30


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 rows about six images."""
    path = tmp_path_factory.mktemp("data") / "rows.parquet"
    write_rows(path, rows(18, seed=0, size=112))
    return path


class Counting:
    """An expert whose features are the means of the colours."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.embedded = 0
        self._fail_at = fail_at

    def embed(self, image: np.ndarray) -> Embedding:
        if self.embedded == self._fail_at:
            raise KeyboardInterrupt
        self.embedded += 1
        return Embedding(
            features=(torch.from_numpy(image.mean(axis=(0, 1)).astype(np.float32)).reshape(1, 3, 1, 1),),
            original=Size(image.shape[1], image.shape[0]),
            content=Size(8, 8),
        )


def filled(
    file: Path, folder: Path, expert: Counting, *, limit: int = GIB, say: Callable[[str], None] = print
) -> Filled:
    store = EmbeddingStore(folder, limit=limit, fingerprint="f")
    return embed_dataset(Dataset.open(file), expert, store, limit=limit, say=say)  # type: ignore[arg-type]


def test_each_image_is_embedded_once_and_found_by_its_key(file: Path, tmp_path: Path) -> None:
    expert = Counting()
    found = filled(file, tmp_path, expert)
    assert expert.embedded == 6 and (found.images, found.embedded, found.stored) == (6, 6, 6)
    assert found.bytes == sum(path.stat().st_size for path in tmp_path.glob("*.embedding"))
    store = EmbeddingStore(tmp_path, limit=GIB, fingerprint="f")
    for sample in Dataset.open(file):
        kept, made = store.get(sample.image_key), Counting().embed(sample.image())
        assert kept is not None and kept.features[0].equal(rounded(made).features[0])


def test_an_interrupted_command_goes_on_where_it_was(file: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        filled(file, tmp_path, Counting(fail_at=4))
    expert = Counting()
    assert filled(file, tmp_path, expert).embedded == 2 and expert.embedded == 2
    assert next(filled(file, tmp_path, Counting()).lines()) == "6 images: 0 embedded now, 6 were there"


def test_a_dataset_that_does_not_fit_is_told_with_what_it_needs(file: Path, tmp_path: Path) -> None:
    warnings: list[str] = []
    limit = 1000
    found = filled(file, tmp_path, Counting(), limit=limit, say=warnings.append)
    assert found.stored < 6 and f"{6 - found.stored} are not there any more" in "\n".join(found.lines())
    assert warnings == []  # of the features alone it would
    filled(file, tmp_path / "small", Counting(), limit=35, say=warnings.append)
    assert len(warnings) == 1 and "6 images need 3.35e-08 GiB, and the folder may have 3.26e-08" in warnings[0]
    assert "give --disk-gib 2, and the run the same segmenter.embeddings.disk_gib" in warnings[0]


@pytest.mark.parametrize(
    ("embed", "write", "read", "visit"),
    [(1.0, 0.0, 0.1, 2), (1.0, 0.5, 0.5, 3), (1.0, 2.0, 0.2, 4), (0.1, 0.1, 0.1, None), (0.1, 0.1, 0.2, None)],
)
def test_storing_pays_from_the_first_visit_at_which_all_of_it_took_less(
    embed: float, write: float, read: float, visit: int | None
) -> None:
    assert Costs(embed=embed, write=write, read=read).pays_from == visit
    pays = [v for v in range(1, 100) if embed + write + (v - 1) * read < v * embed]
    assert (pays[0] if pays else None) == visit


def command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["expert", "embed", *map(str, arguments)])


def refused(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What a command says that ends with exit code 2."""
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: app(["expert", "embed", *map(str, arguments)], standalone_mode=False))
    assert ended.value.code == 2
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == 1
    return said[0]


def test_the_command_fills_the_folder_in_which_a_run_looks(file: Path, tmp_path: Path) -> None:
    result = command(file, "--folder", tmp_path / "embeddings", "--disk-gib", "1")
    assert result.exit_code == 0, result.output
    assert "6 images: 6 embedded now, 0 were there" in result.output
    assert re.search(r"in all, [\d.]+ KiB an image\nan image takes .* ms to embed anew, .* ms to write", result.output)
    assert re.search(r"storing (pays from visit \d+ of an image on|does not pay)", result.output)
    expert = load_expert("tiny")
    cache = open_cache(EmbeddingsConfig(folder=tmp_path / "embeddings"), expert)
    for sample in Dataset.open(file):
        found, made = cache.get(sample.image_key), rounded(expert.embed(sample.image()))
        assert found is not None and all(a.equal(b) for a, b in zip(found.features, made.features, strict=True))
    assert "0 embedded now, 6 were there" in command(file, "--folder", tmp_path / "embeddings").output
    other = command(file, "--folder", tmp_path / "embeddings", "--dtype", "bfloat16")
    assert "6 embedded now, 0 were there" in other.output


def test_what_a_user_can_get_wrong_is_one_line(
    file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = "--folder", tmp_path / "embeddings"
    assert "missing.parquet" in refused(capfd, tmp_path / "missing.parquet", *folder)
    assert "no expert or folder is called 'tinny'" in refused(capfd, file, *folder, "--expert", "tinny")
    assert "expert convert" in refused(capfd, file, *folder, "--expert", "sam_vit_b")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "leave out --gpu" in refused(capfd, file, *folder, "--gpu")
    (tmp_path / "file").write_bytes(b"")
    assert "a part of it is a file" in refused(capfd, file, "--folder", tmp_path / "file" / "embeddings")
