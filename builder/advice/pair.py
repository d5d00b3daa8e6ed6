"""A target and a draft that are not a bundle yet, as engines that decode."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ssv.builder.config import DraftConfig, checked
from ssv.builder.given import check_given, write_given
from ssv.builder.target import Target, load_target
from ssv.builder.tokenizer import check_same_tokens
from ssv.bundle.policy import RESERVED_LENGTH
from ssv.model.checkpoint import CheckpointError
from ssv.model.draft import load_draft
from ssv.runtime.decode.costs import place
from ssv.runtime.decode.round import DecodeBatch
from ssv.runtime.engines.contract import Engine
from ssv.runtime.engines.torch_engine import cpu_threads, draft_engine, target_engine
from ssv.support.errors import UserError
