"""`medreasoner expert`: commands about segmentation experts."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from actors.config import EmbeddingsConfig
from actors.experts.published import PUBLISHED_EXPERTS
from cluster.commands.data import Files
from cluster.commands.options import Checkpoint, Expert, examples
from umrg.dataset import Dataset
from umrg.mistake import Mistake

expert_app = typer.Typer(help="Segmentation experts.", no_args_is_help=True)


class Preprocess(StrEnum):
    PUBLISHED = "published"
    NATIVE = "native"


class Precision(StrEnum):
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


@expert_app.callback()
def _expert() -> None:
    """Segmentation experts."""


@expert_app.command(
    epilog=examples("medreasoner expert convert sam_vit_b_01ec64.pth --name sam_vit_b --out sam_vit_b.safetensors")
)
def convert(
    source: Annotated[Path, typer.Argument(help="Checkpoint (.pth), as downloaded or as your own training wrote it.")],
    name: Annotated[str, typer.Option(help=f"One of {', '.join(PUBLISHED_EXPERTS)}.")],
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    key: Annotated[str | None, typer.Option(help="Key of the weights, where the file holds several models.")] = None,
) -> None:
    """Convert a checkpoint to safetensors, which is needed once."""
    # torch takes seconds to import, and `--help` should be quick.
    from actors.experts.convert import convert_checkpoint
    from actors.experts.registry import licence_line

    digest = convert_checkpoint(source, out, name=name, key=key, say=typer.echo)
    typer.echo(f"{out}: {name}, weights sha256 {digest}")
    typer.echo(licence_line(name, out))


@expert_app.command(
    epilog=examples(
        "medreasoner expert embed rows.parquet --folder /scratch/embeddings",
        "medreasoner expert embed rows.parquet --expert sam_vit_b --checkpoint sam_vit_b.safetensors --gpu "
        "--folder /scratch/embeddings --disk-gib 64",
    )
)
def embed(
    files: Files,
    folder: Annotated[Path, typer.Option(file_okay=False, help="Folder to fill, a run's segmenter.embeddings.folder.")],
    expert: Expert = "tiny",
    checkpoint: Checkpoint = None,
    disk_gib: Annotated[
        int, typer.Option(min=1, help="Most bytes of the folder, in GiB; what was unused for longest gives way.")
    ] = EmbeddingsConfig().disk_gib,
    preprocess: Annotated[Preprocess, typer.Option(help="As the run's segmenter.preprocess.")] = Preprocess.PUBLISHED,
    dtype: Annotated[Precision, typer.Option(help="As the run's segmenter.dtype.")] = Precision.FLOAT32,
    gpu: Annotated[bool, typer.Option("--gpu", help="Embed on a GPU, as for a run whose segmenters have one.")] = False,
) -> None:
    """Embed every image of a dataset ahead of a run, so that its segmenters find them on their node's disk.

    Those that are there are left alone: after an interruption the same command goes on. At the end it tells from which
    visit of an image on that pays, as measured here.
    """
    dataset = Dataset.open(files)
    import torch

    from actors.experts.registry import licence_line, load_expert
    from actors.experts.store import EmbeddingStore
    from cluster.commands.embedding import GIB, embed_dataset

    if gpu and not torch.cuda.is_available():
        raise Mistake("torch finds no GPU here; leave out --gpu, or see `medreasoner doctor`")
    loaded = load_expert(
        expert,
        checkpoint=checkpoint,
        device="cuda" if gpu else "cpu",
        dtype=dtype.value,
        preprocess=preprocess.value,
    )
    typer.echo(licence_line(expert, checkpoint))
    store = EmbeddingStore(folder, limit=disk_gib * GIB, fingerprint=loaded.fingerprint())
    filled = embed_dataset(
        dataset, loaded, store, limit=disk_gib * GIB, say=lambda text: typer.echo(f"warning: {text}", err=True)
    )
    typer.echo(f"{folder}: " + "\n".join(filled.lines()))
