"""Tensors written to a file as a whole or not at all."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ssv.support.errors import UserError


def save_whole(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file in one step, over the one that is there.

    Raises:
        UserError: it cannot be written, as on a full disk; nothing is left behind, and what was there stays.
    """
    part = path.with_name(path.name + ".part")
    try:
        save_file(tensors, part, metadata=metadata)
        part.replace(path)
    except (OSError, SafetensorError) as error:  # what the library makes of a full disk
        part.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({error})", "choose a place with more room") from error
    except BaseException:
        part.unlink(missing_ok=True)
        raise
