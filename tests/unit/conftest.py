"""Kernels run in Triton's interpreter here, which has to be chosen before they are imported; examples of properties are
the same in every run.
"""

import os

from hypothesis import settings

os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("ssv", derandomize=True, deadline=None, database=None)
settings.load_profile("ssv")
