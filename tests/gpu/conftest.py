"""These tests need a GPU and fail where there is none: `make test-gpu` and `make test-tensorrt` are for machines that
have it."""

import pytest
import torch


@pytest.fixture(autouse=True)
def cuda() -> None:
    assert torch.cuda.is_available(), "tests/gpu needs an NVIDIA GPU and a CUDA build of torch"
