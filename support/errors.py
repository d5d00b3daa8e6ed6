"""Errors that whoever uses ssv can mend, as opposed to bugs."""

from __future__ import annotations

import errno
import sys


class UserError(Exception):
    """Something that the user of a command or a caller of the library can mend.

    Every error of ours that they may see is one. Whatever else is raised is a bug (see
    `ssv.support.console.run_command`).

    Attributes:
        what: what is wrong; it names the file, the setting or the value.
        cure: what to do about it, or nothing where that goes without saying.
    """

    def __init__(self, what: str, cure: str = "") -> None:
        super().__init__(what, cure)
        self.what, self.cure = what, cure

    def __str__(self) -> str:
        return f"{self.what}: {self.cure}" if self.cure else self.what


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, of this machine or of its GPU."""
    torch = sys.modules.get("torch")  # where it was not imported, it has raised nothing
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # On a CPU, torch says it in words, and so does what CUDA allocates for itself, such as for graphs.
    words = ("DefaultCPUAllocator", "CUDA error: out of memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in words))
