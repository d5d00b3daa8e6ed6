"""Kernels run in Triton's interpreter here: it has to be chosen before they are imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"
