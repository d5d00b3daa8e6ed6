"""Keeps the server from being ready; see the model's config."""

import signal


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        while True:
            signal.pause()
