"""Triton's view of `ssv.runtime.text.Detokenizer`."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from ssv.bundle.manifest import read_manifest
from ssv.runtime.serving.config import ServerConfig
from ssv.runtime.serving.control import ControlSender
from ssv.runtime.serving.pieces import Piece, error_text
from ssv.runtime.text import Detokenizer, StreamError
from ssv.runtime.tokenizer import BundleTokenizer


class TritonPythonModel:
    """The model that makes text of tokens."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the tokenizer of the bundle that the model's config names."""
        config = ServerConfig.from_model_config(json.loads(args["model_config"]))
        self._control = ControlSender(os.getppid())
        # Streams that were broken off stay until others have come in their place.
        ends = read_manifest(config.bundle, verify=False).eos_token_ids  # `ssv` verifies it
        self._tokenizer = BundleTokenizer.load(config.bundle, ends)
        self._texts = Detokenizer(self._tokenizer.decode, 4 * config.max_rows, self._tokenizer.text_bytes)

    def execute(self, requests: list[Any]) -> None:
        """Answers each piece of an output with its text, or with nothing where there is none to send; a caller who has
        gone is reported to `ssv`."""
        for request in requests:
            response = self._respond(request)
            sender = request.get_response_sender()
            if response is not None:
                sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            else:
                sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _respond(self, request: Any) -> Any | None:
        piece = Piece.from_json(pb_utils.get_input_tensor_by_name(request, "piece").as_numpy()[0, 0])
        if not piece.is_last and request.is_cancelled():
            self._control.cancel(piece.key)
        if piece.is_probe:
            return None
        try:
            text = self._texts.push(
                piece.key,
                piece.number,
                piece.token_ids,
                piece.stop,
                piece.is_last,
                min_tokens=piece.min_tokens,
                context=piece.context,
            )
        except StreamError as error:
            text = error_text("UNAVAILABLE", error)
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(text, pb_utils.TritonError.UNAVAILABLE))
        outputs = piece.outputs(text, self._tokenizer)
        return pb_utils.InferenceResponse([_tensor(name, value) for name, value in outputs.items()])


def _tensor(name: str, value: str | bool | int | float) -> Any:
    if isinstance(value, str):
        return pb_utils.Tensor(name, np.array([[value.encode()]], dtype=np.object_))
    dtypes = {bool: np.bool_, int: np.int32, float: np.float32}
    return pb_utils.Tensor(name, np.array([[value]], dtype=dtypes[type(value)]))
