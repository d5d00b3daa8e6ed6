"""Layers of a decoder as torch.compile makes them, for training: fewer passes over the activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch

from ssv.model.decoder import Decoder, Layer

_MOST_SHAPES = 64
"""Shapes and modes that one function is compiled for: the writer's, the trainer's, with and without gradients."""


@cache
def _compiled() -> tuple[Callable[..., Any], Callable[..., Any]]:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_SHAPES)
    return torch.compile(Layer.project, dynamic=False), torch.compile(Layer.finish, dynamic=False)


@contextmanager
def compile_layers(*decoders: Decoder) -> Iterator[None]:
    """Within, the layers' arithmetic before and after attention is compiled: once for all layers of a shape."""
    project, finish = _compiled()
    layers = [layer for decoder in decoders for layer in decoder.blocks()]
    for layer in layers:
        # In the instance's own dictionary, before the class's: `Layer.forward` calls them.
        layer.__dict__["project"], layer.__dict__["finish"] = partial(project, layer), partial(finish, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["project"], layer.__dict__["finish"]
