"""Experts by name.

To add an expert of another architecture, write its class behind `actors.experts.protocol.Expert` in a module of its
own, with a function that loads it, and name that in `LOADERS`. Another SAM only needs its sizes in
`actors.experts.sam_config`.
"""

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path

from actors.experts.protocol import Expert, Preprocess
from actors.experts.sam import SamExpert, build_sam
from actors.experts.sam_config import PUBLISHED_EXPERTS, PublishedExpert, SamConfig, read_config
from actors.experts.weights import load_into, read_header
from umrg.mistake import Mistake

NOT_STATED = "not stated"
TINY_LICENCE = "Apache-2.0 (MedReasoner)"
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

    name: one of `LOADERS`; or a folder with `config.json` and `model.safetensors`, as training the tiny expert writes;
    or a file written by `medreasoner expert convert`, which knows its expert's name. checkpoint: safetensors file of
    the weights; published experts need it, a folder brings its own. Raises ValueError for an unknown name, for missing
    weights or weights of other shapes, and for a preprocessing that the expert does not have.
    """
    load = LOADERS.get(name, _load_sam)
    return load(name, checkpoint, device, dtype, preprocess)


def check_expert(name: str, checkpoint: Path | None, preprocess: Preprocess) -> None:
    """Raise ValueError as `load_expert` would, except for weights of other shapes, without loading anything."""
    if LOADERS.get(name, _load_sam) is _load_sam:
        _find_sam(name, checkpoint, preprocess)


def sam_config(name: str) -> SamConfig | None:
    """Sizes of an expert, from its name, folder or file; None if they are not known. Its weights need not be there."""
    given = Path(name)
    if name not in LOADERS and given.is_file():
        name = read_header(given).metadata.get("name", name)
    if name in PUBLISHED_EXPERTS:
        return PUBLISHED_EXPERTS[name].config
    folder = TINY_FOLDER if name == "tiny" else given
    return read_config(folder / "config.json") if folder.is_dir() else None


def licence(name: str, checkpoint: Path | None = None) -> str:
    """Licence of an expert's weights, with whose it is; `NOT_STATED` for weights of which nothing says it.

    name, checkpoint: as `load_expert` takes them. A folder says it in its `config.json`. A converted file knows the
    digest of what it was made of: one that is not the official file, such as a training of one's own, states none.
    Raises ValueError as `sam_config` does.
    """
    given = Path(name)
    if name not in LOADERS and given.is_file():
        name, checkpoint = read_header(given).metadata.get("name", name), given
    if name in PUBLISHED_EXPERTS:
        return _published_licence(PUBLISHED_EXPERTS[name], checkpoint)
    if name == "tiny":
        return TINY_LICENCE if checkpoint is None else NOT_STATED
    stated = name not in LOADERS and checkpoint is None and given.is_dir()
    return (read_config(given / "config.json").licence if stated else None) or NOT_STATED


def _published_licence(expert: PublishedExpert, checkpoint: Path | None) -> str:
    source = None if checkpoint is None else read_header(checkpoint).metadata.get("source_sha256", "")
    official = source is None or expert.sha256 is None or source.startswith(expert.sha256)
    return expert.licence if official else NOT_STATED


def _load_sam(name: str, checkpoint: Path | None, device: str, dtype: str, preprocess: Preprocess) -> Expert:
    name, config, weights = _find_sam(name, checkpoint, preprocess)
    sam = build_sam(config)
    load_into(sam, weights, name=name)
    return SamExpert(sam, config, name=name, preprocess=preprocess, device=device, dtype=dtype)


LOADERS: Mapping[str, Callable[[str, Path | None, str, str, Preprocess], Expert]] = {
    "tiny": _load_sam,
    **dict.fromkeys(PUBLISHED_EXPERTS, _load_sam),
}
"""The function that loads each expert, from its name, checkpoint, device, dtype and preprocessing. It raises ValueError
for what a user can get wrong."""


def _find_sam(name: str, checkpoint: Path | None, preprocess: Preprocess) -> tuple[str, SamConfig, Path]:
    """Name, sizes and weights file of a Segment Anything model."""
    given = Path(name)
    if name not in LOADERS and given.is_file():
        name, checkpoint = read_header(given).metadata.get("name", name), given
    folder = TINY_FOLDER if name == "tiny" else given
    if name in PUBLISHED_EXPERTS:
        config, weights = PUBLISHED_EXPERTS[name].config, checkpoint or _missing_checkpoint(name)
    elif folder.is_dir():
        config, weights = read_config(folder / "config.json"), checkpoint or folder / "model.safetensors"
    else:
        nearest = difflib.get_close_matches(name, LOADERS, n=1, cutoff=0)[0]
        raise Mistake(f"no expert or folder is called {name!r}; the nearest expert is {nearest!r}")
    _check_preprocess(name, preprocess)
    read_header(weights)
    return name, config, weights


def _missing_checkpoint(name: str) -> Path:
    official = PUBLISHED_EXPERTS[name]
    raise Mistake(
        f"{name} needs its weights: get {official.checkpoint} from {official.source}, run "
        f"`medreasoner expert convert {official.checkpoint} --name {name} --out {name}.safetensors`, "
        "and give that file as checkpoint"
    )


def _check_preprocess(name: str, preprocess: Preprocess) -> None:
    if preprocess not in ("published", "native"):
        raise Mistake(f"preprocess is published or native, not {preprocess!r}")
    if preprocess == "native" and name != "medsam_vit_b":
        raise Mistake(f"{name} has one preprocessing, `published`; `native` is for medsam_vit_b")
