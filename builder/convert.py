"""Makes safetensors files of what others pickled, without running what a pickle may hold."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ssv.model.checkpoint import CheckpointError
from ssv.model.eagle3 import is_eagle3
from ssv.model.heads import from_published
from ssv.support.files import save_whole


def convert_heads(source: Path, out: Path) -> None:
    """Makes a safetensors file of a file that `torch.save` made: of Medusa's heads, for `load_heads`, or of an EAGLE-3
    head, for `read_eagle3`.

    torch reads it with its unpickler for weights alone, which makes tensors and containers of them and calls nothing
    else.

    Raises:
        CheckpointError: not there, damaged, more than tensors, or no heads.
    """
    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{source} does not exist") from error
    except Exception as error:  # whatever the unpickler makes of it
        raise CheckpointError(
            f"{source} is damaged or holds more than tensors, and is not read ({_reason(error)})",
            "ask its authors for a safetensors file",
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise CheckpointError(f"{source} is no table of tensors by name, as heads are")
    if not is_eagle3(state):
        from_published(state, source)
    save_whole({name: value.contiguous().clone() for name, value in state.items()}, out, metadata={"format": "pt"})


def _reason(error: Exception) -> str:
    """What the unpickler found, without torch's advice on how to read it all the same."""
    *_, found = str(error).rpartition("WeightsUnpickler error: ")
    lines = (line.strip() for line in found.partition(" was not an allowed")[0].splitlines())
    return next(filter(None, lines), type(error).__name__)
