"""A draft as the third round's recipe makes it: five taps, a corrected LM head, stored as int8 and read back."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tiny import random_draft

from ssv.model.decoder import Decoder
from ssv.model.draft import Draft, load_draft, save_draft

TAPS = (0, 2, 3, 4, 6)
"""Of a target of 7 layers."""


def wide_draft(target: Decoder, num_layers: int = 1) -> tuple[Draft, Draft]:
    """The draft as it decodes, and as it is trained: the numbers are the same, but for the LM head, which is one matrix
    in the first and the target's rows with a correction in the second."""
    draft = random_draft(target, "conditioned", layers=TAPS, num_layers=num_layers, head_rank=8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "draft.safetensors"
        save_draft(draft, path, storage="int8")
        return load_draft(path, target), load_draft(path, target, for_training=True)
