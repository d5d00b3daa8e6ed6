"""Heads that are made when their first logits are asked for: most that are loaded never are, and they take a tenth to a
quarter of a second and 20 MB.
"""

from __future__ import annotations

import threading

from torch import Tensor

from ssv.model.heads import HeadsParts
from ssv.runtime.engines.contract import HeadsEngine
from ssv.runtime.engines.torch_engine import heads_engine, vocabulary_ids
from ssv.support.precisions import TorchPrecision


class HeadsOnDemand:
    """Heads beside a target's torch engine, see `HeadsEngine`; from any thread."""

    def __init__(self, parts: HeadsParts, *, precision: TorchPrecision, device: str = "cpu") -> None:
        """Notes what the heads are made of; they are made later.

        Args:
            precision, device: the target's engine's.
        """
        spec = parts.file.spec
        self.num_heads = spec.num_heads
        self.token_ids_V = vocabulary_ids(parts.file.token_ids_V, spec.vocab_size)
        self._precision, self._device = precision, device
        self._parts: HeadsParts | None = parts
        self._engine: HeadsEngine | None = None
        self._making = threading.Lock()

    def logits(self, hidden_RH: Tensor) -> Tensor:
        """See `HeadsEngine.logits`; the first time the heads are made."""
        with self._making:
            if self._parts is not None:
                heads = self._parts.make(dtype=None)
                self._engine = heads_engine(heads, precision=self._precision, device=self._device)
                self._parts = None  # what they were made of is held no longer
        assert self._engine is not None
        return self._engine.logits(hidden_RH)
