"""Keeps the server from being ready; see the model's config."""


class TritonPythonModel:
    """A model that cannot be loaded."""

    def initialize(self, args: dict[str, str]) -> None:
        """Raises RuntimeError: a model that does not load keeps the server from being ready."""
        raise RuntimeError("the server drains, and is to say that it is not ready")
