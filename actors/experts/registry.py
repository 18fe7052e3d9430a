"""The experts that can be loaded, by name."""

import difflib
from pathlib import Path

from actors.experts.config import EXPERT_NAMES, PUBLISHED_EXPERTS, SamConfig, read_config
from actors.experts.protocol import Expert, Preprocess
from actors.experts.sam import SamExpert, build_sam
from actors.experts.weights import load_into, read_header

TINY_FOLDER = Path(__file__).parents[2] / "models" / "tiny-expert"


def load_expert(
    name: str,
    *,
    checkpoint: Path | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    preprocess: Preprocess = "published",
) -> Expert:
    """Load a frozen expert.

    name: one of `EXPERT_NAMES`, a folder with `config.json` and `model.safetensors` such as the training of the tiny
    expert writes, or a file from `medreasoner expert convert`, whose metadata has the expert's name.
    checkpoint: safetensors file of the weights, which published experts need; a folder has its own.
    Raises ValueError for an unknown name, missing weights or weights of the wrong shapes, or a preprocessing that the
    expert does not have.
    """
    name, config, weights = find_expert(name, checkpoint, preprocess)
    sam = build_sam(config)
    load_into(sam, weights, name=name)
    return SamExpert(sam, config, name=name, preprocess=preprocess, device=device, dtype=dtype)


def find_expert(name: str, checkpoint: Path | None, preprocess: Preprocess) -> tuple[str, SamConfig, Path]:
    """Name, sizes and weights file of the expert that `load_expert` would load. Raises ValueError as it does, except
    that shapes are not checked."""
    given = Path(name)
    if name not in EXPERT_NAMES and given.is_file():
        name, checkpoint = read_header(given).metadata.get("name", name), given
    folder = TINY_FOLDER if name == "tiny" else given
    if name in PUBLISHED_EXPERTS:
        config, weights = PUBLISHED_EXPERTS[name].config, checkpoint or _missing_checkpoint(name)
    elif folder.is_dir():
        config, weights = read_config(folder / "config.json"), checkpoint or folder / "model.safetensors"
    else:
        nearest = difflib.get_close_matches(name, EXPERT_NAMES, n=1, cutoff=0)[0]
        raise ValueError(f"no expert or folder is called {name!r}; the nearest expert is {nearest!r}")
    _check_preprocess(name, preprocess)
    read_header(weights)
    return name, config, weights


def _missing_checkpoint(name: str) -> Path:
    official = PUBLISHED_EXPERTS[name]
    raise ValueError(
        f"{name} needs its weights: get {official.checkpoint} from {official.source}, run "
        f"`medreasoner expert convert {official.checkpoint} --name {name} --out {name}.safetensors`, "
        "and give that file as checkpoint"
    )


def _check_preprocess(name: str, preprocess: Preprocess) -> None:
    if preprocess not in ("published", "native"):
        raise ValueError(f"preprocess is published or native, not {preprocess!r}")
    if preprocess == "native" and name != "medsam_vit_b":
        raise ValueError(f"{name} has one preprocessing, `published`; `native` is for medsam_vit_b")
