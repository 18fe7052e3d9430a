"""Experts by name.

To add an expert of another architecture, write its class in a module of its own, most simply upon
`actors.experts.promptable.Promptable`, with a function that loads it, and name that in `LOADERS`. Another SAM, SAM 2.1
or SAM-Med2D only needs a line in `actors.experts.published`.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.nn import Module

from actors.experts import layouts
from actors.experts.layouts import Layout
from actors.experts.promptable import Promptable
from actors.experts.protocol import Expert, Preprocess
from actors.experts.published import PUBLISHED_EXPERTS, Config, FamilyName, PublishedExpert
from actors.experts.sam import SamExpert, build_sam
from actors.experts.sam2 import Sam2Expert, build_sam2
from actors.experts.sam_config import read_config
from actors.experts.sam_med2d import SamMed2dExpert, build_sam_med2d
from actors.experts.weights import load_into, read_header
from umrg.mistake import Mistake

NOT_STATED = "not stated"
TINY_LICENCE = "Apache-2.0 (MedReasoner)"
TINY_FOLDER = Path(__file__).parents[2] / "models" / "tiny-expert"


@dataclass(frozen=True, kw_only=True)
class Family:
    """How experts of one architecture are built, loaded, and named in checkpoints."""

    build: Callable[[Any], Module]
    """A model of the sizes of a configuration, in float32 with random weights."""
    expert: Callable[..., Promptable]
    """The expert of a model and its configuration, with name, preprocess, device and dtype."""
    layouts: tuple[Layout, ...]
    """Those of the files that can be converted, the most usual first."""


FAMILIES: Mapping[FamilyName, Family] = {
    "sam": Family(build=build_sam, expert=SamExpert, layouts=(layouts.OWN, layouts.SAM_IN_TRANSFORMERS)),
    "sam_med2d": Family(build=build_sam_med2d, expert=SamMed2dExpert, layouts=(layouts.SAM_MED2D, layouts.OWN)),
    "sam2": Family(build=build_sam2, expert=Sam2Expert, layouts=(layouts.SAM2, layouts.SAM2_IN_TRANSFORMERS)),
}


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the loader of published experts and of folders knows of one."""

    name: str
    family: Family
    config: Config


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
    load = LOADERS.get(name, _load)
    return load(name, checkpoint, device, dtype, preprocess)


def check_expert(name: str, checkpoint: Path | None, preprocess: Preprocess) -> None:
    """Raise ValueError as `load_expert` would, except for weights of other shapes, without loading anything."""
    if LOADERS.get(name, _load) is _load:
        _find_with_weights(name, checkpoint, preprocess)


def find_sizes(name: str, preprocess: Preprocess = "published") -> Found | None:
    """Architecture and sizes of an expert, from its name, folder or file; None if they are not known. Its weights need
    not be there. Raises ValueError for a preprocessing that it does not have, and a folder's invalid `config.json`."""
    given = Path(name)
    if name not in LOADERS and given.is_file():
        name = read_header(given).metadata.get("name", name)
    if name in PUBLISHED_EXPERTS:
        published = PUBLISHED_EXPERTS[name]
        family, config, native = published.family, published.config, published.native
    elif (folder := TINY_FOLDER if name == "tiny" else given).is_dir():
        family, config, native = "sam", read_config(folder / "config.json"), None
    else:
        return None
    return Found(name=name, family=FAMILIES[family], config=_preprocessed(name, preprocess, config, native))


def licence(name: str, checkpoint: Path | None = None) -> str:
    """Licence of an expert's weights, with whose it is; `NOT_STATED` for weights of which nothing says it.

    name, checkpoint: as `load_expert` takes them. A folder says it in its `config.json`. A converted file knows the
    digest of what it was made of: one that is not the official file, such as a training of one's own, states none;
    where the official one's digest is not known, the licence is said with an if.
    Raises ValueError as `find_sizes` does.
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


def licence_line(name: str, checkpoint: Path | None = None) -> str:
    """What is said of an expert where it is loaded, once in a command. Raises ValueError as `licence` does."""
    return f"expert: {name}, licence of the weights: {licence(name, checkpoint)}"


def _published_licence(expert: PublishedExpert, checkpoint: Path | None) -> str:
    source = None if checkpoint is None else read_header(checkpoint).metadata.get("source_sha256", "")
    if source is None:
        return expert.licence
    if expert.sha256 is None:
        return f"{expert.licence}, if they are the official ones"
    return expert.licence if source.startswith(expert.sha256) else NOT_STATED


def _load(name: str, checkpoint: Path | None, device: str, dtype: str, preprocess: Preprocess) -> Expert:
    found, weights = _find_with_weights(name, checkpoint, preprocess)
    model = found.family.build(found.config)
    load_into(model, weights, name=found.name)
    return found.family.expert(model, found.config, name=found.name, preprocess=preprocess, device=device, dtype=dtype)


LOADERS: Mapping[str, Callable[[str, Path | None, str, str, Preprocess], Expert]] = {
    "tiny": _load,
    **dict.fromkeys(PUBLISHED_EXPERTS, _load),
}
"""The function that loads each expert, from its name, checkpoint, device, dtype and preprocessing. It raises ValueError
for what a user can get wrong."""


def _find_with_weights(name: str, checkpoint: Path | None, preprocess: Preprocess) -> tuple[Found, Path]:
    """What is known of an expert, and the file of its weights, which is a safetensors file."""
    given = Path(name)
    found = find_sizes(name, preprocess)
    if found is None:
        nearest = difflib.get_close_matches(name, LOADERS, n=1, cutoff=0)[0]
        raise Mistake(f"no expert or folder is called {name!r}; the nearest expert is {nearest!r}")
    if name not in LOADERS and given.is_file():
        weights = given
    elif found.name in PUBLISHED_EXPERTS:
        weights = checkpoint or _missing_checkpoint(found.name)
    else:
        weights = checkpoint or (TINY_FOLDER if name == "tiny" else given) / "model.safetensors"
    read_header(weights)
    return found, weights


def _missing_checkpoint(name: str) -> Path:
    official = PUBLISHED_EXPERTS[name]
    raise Mistake(
        f"{name} needs its weights: get {official.checkpoint} from {official.source}, run "
        f"`medreasoner expert convert {official.checkpoint} --name {name} --out {name}.safetensors`, "
        "and give that file as checkpoint"
    )


def _preprocessed(name: str, preprocess: Preprocess, published: Config, native: Config | None) -> Config:
    if preprocess not in ("published", "native"):
        raise Mistake(f"preprocess is published or native, not {preprocess!r}")
    if preprocess == "published":
        return published
    if native is None:
        having = " and ".join(other for other, expert in PUBLISHED_EXPERTS.items() if expert.native)
        raise Mistake(f"{name} has one preprocessing, `published`; `native` is for {having}")
    return native
