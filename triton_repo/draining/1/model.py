"""Keeps the server from being ready; see the model's config."""


class TritonPythonModel:
    """A model that cannot be loaded."""

    def initialize(self, args: dict[str, str]) -> None:
        raise RuntimeError("the server drains, and is to say that it is not ready")
