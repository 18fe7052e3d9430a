"""Train the tiny reasoner from scratch.

    python -m models.train_tiny_reasoner [--out models/tiny-reasoner] [--rows 24000] [--passes 2] [key=value …]

Builds the untrained model and draws phantoms with coarse annotations (loose boxes, jittered points) and the seen
phrasings. Then the vision tower learns to locate structures (`models.tiny_vision`, for `--passes` epochs), the first
layers learn the positions of image tokens (`models.tiny_position`), and all layers learn to locate what a query asks
for (`models.tiny_pointing`). Finally it runs `medreasoner sft configs/tiny_reasoner_sft.yaml`, to which `key=value` is
passed. This takes an estimated 40 minutes on two cores. `python -m models.measure` evaluates the model. A short trial:

    python -m models.train_tiny_reasoner --out /tmp/trial --rows 64 --short steps=2
"""

import argparse
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from cluster.cli import run_command
from cluster.config import SftConfig, load_config
from cluster.sft import sft
from models.build_tiny_reasoner import TRAINED_MODALITIES, build
from models.tiny_pointing import PointingRecipe, learn_to_point
from models.tiny_position import PositionRecipe, learn_positions
from models.tiny_vision import Pretraining, pretrain_vision
from phantoms import rows
from umrg.atomic import written_aside
from umrg.dataset import Dataset
from umrg.dataset_writer import write_rows

CONFIG = Path(__file__).parents[1] / "configs" / "tiny_reasoner_sft.yaml"
PARTS = 2  # processes that draw phantoms, each into its own file; the drawn rows depend on it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("models/tiny-reasoner"))
    parser.add_argument("--rows", type=int, default=24000)
    parser.add_argument("--passes", type=float, default=2.0)
    parser.add_argument("--short", action="store_true", help="a few steps of each stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tiny-reasoner-") as name:
        folder = Path(name)
        print("building the untrained model", flush=True)
        reasoner = build(args.seed)
        print(f"drawing {args.rows} phantom rows", flush=True)
        parts = draw(folder, args.rows, args.seed)
        dataset = Dataset.open(parts)
        short = {"steps": 4} if args.short else {}
        pretrain_vision(reasoner, dataset, Pretraining(passes=args.passes, seed=args.seed))
        found = learn_positions(reasoner, dataset, PositionRecipe(seed=args.seed, **short))
        print(f"positions: {found:.1%} of the image tokens know where they are", flush=True)
        found = learn_to_point(reasoner, dataset, PointingRecipe(seed=args.seed, **short))
        print(f"pointing: {found:.1%} of the queries are pointed at the right box", flush=True)
        reasoner.save(folder / "start")
        config = load_config(
            SftConfig,
            CONFIG,
            [
                f"model={folder / 'start'}",
                f"data.train=[{','.join(parts)}]",
                f"runs={folder}",
                *args.overrides,
            ],
        )
        trained = sft(config).model
        with written_aside(args.out) as aside:
            shutil.copytree(trained, aside)
            # The new folder replaces the old one, so its model card has to be kept.
            if (card := args.out / "README.md").exists():
                shutil.copy(card, aside)
    print(f"the model lies in {args.out}")


def draw(folder: Path, count: int, seed: int) -> list[str]:
    """Write the training rows in parts, one process per part. Returns the paths of the files."""
    paths = [folder / f"part-{part}.parquet" for part in range(PARTS)]
    with ProcessPoolExecutor(PARTS) as pool:
        list(pool.map(_draw_part, paths, [count // PARTS] * PARTS, range(PARTS * seed + 1, PARTS * (seed + 1) + 1)))
    return [str(path) for path in paths]


def _draw_part(path: Path, count: int, seed: int) -> None:
    write_rows(path, rows(count, seed=seed, modalities=TRAINED_MODALITIES, annotation="coarse"))


if __name__ == "__main__":
    run_command(main)
