"""Reading of checkpoint files without executing code from them."""

import pickle
import re
import struct
import warnings
import zipfile
from pathlib import Path

import torch

from actors.experts.weights import read_tensors
from umrg.foreign_files import first_bytes, what_it_is
from umrg.mistake import Mistake

_DAMAGED = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError, EOFError, struct.error)
"""The exceptions of torch's weights-only unpickler, which accepts only containers and tensors, for damaged files."""


def read_checkpoint(source: Path) -> object:
    """The object that `torch.save` or safetensors wrote to a file. Raises ValueError if the file is not a checkpoint,
    with what it is instead, if it is damaged, or if it cannot be loaded without executing code."""
    start = first_bytes(source)
    if start.startswith(b"PK\x03\x04"):
        _check_archive(source)
    elif start[8:9] == b"{":
        return read_tensors(source)
    elif kind := what_it_is(source):
        raise Mistake(f"{source} is {kind}; a checkpoint is a .pth or .safetensors file")
    try:
        with warnings.catch_warnings():
            # torch warns of older pickle protocols, which do not matter here.
            warnings.simplefilter("ignore")
            return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise Mistake(f"{source} {_refused(str(error))}") from error
    except OSError as error:
        raise Mistake(f"{source} cannot be read: {error.strerror}") from error
    except _DAMAGED as error:
        raise Mistake(f"{source} is no PyTorch checkpoint, or a damaged one; download it again") from error


def _check_archive(source: Path) -> None:
    """Raise ValueError if a zip archive was not written by `torch.save`."""
    try:
        with zipfile.ZipFile(source) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, *_DAMAGED) as error:
        raise Mistake(f"{source} is cut short or damaged; download it again") from error
    parts = {name.partition("/")[2] for name in names}
    if "constants.pkl" in parts:
        raise Mistake(
            f"{source} is a TorchScript archive, which holds code; save the weights alone, where it was made, with "
            "`torch.save(torch.jit.load(FILE).state_dict(), NEW)`"
        )
    if "data.pkl" not in parts:
        raise Mistake(f"{source} is a zip archive and no PyTorch checkpoint; unpack it, and give the file in it")


def _refused(error: str) -> str:
    """A phrase that says what the unpickler refused."""
    # Only the names are taken from its message, because it goes on to advise loading the file anyway.
    names = sorted(set(re.findall(r"GLOBAL ([\w.]+)", error)))
    if not names:
        return "is no PyTorch checkpoint, or a damaged one; download it again"
    return (
        f"holds Python objects ({', '.join(names)}), and whoever loads such runs code from the file; save the weights "
        "alone, where it was made, with `torch.save(model.state_dict(), NEW)`"
    )
