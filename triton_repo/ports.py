"""The tensors that the models of the server take and give, as their config.pbtxt files declare them.

`python -m ssv.triton_repo.ports` writes that part of the files: run it after a change of what clients may send
(`ssv.runtime.serving.intake`) or of what they are answered (`ssv.runtime.reply`).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from ssv.runtime.reply import outputs
from ssv.runtime.serving import intake

BEGIN = "# Written by `python -m ssv.triton_repo.ports`."
END = "# The end of what it has written."

_KINDS = {str: "STRING", bool: "BOOL", int: "INT32", float: "FP32"}
HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Port:
    """A tensor that goes into a model or comes out of it.

    Attributes:
        kind: Triton's, without "TYPE_".
        size: elements; -1 for any number.
        meaning: for who reads the file; empty where the name says it.
    """

    name: str
    kind: str = "STRING"
    size: int = 1
    meaning: str = ""
    is_optional: bool = False

    def text(self, side: str) -> str:
        """Returns the declaration as text of a config file."""
        optional = "  optional: true\n" if self.is_optional else ""
        meaning = f"# {self.meaning}\n" if self.meaning else ""
        return (
            f"{meaning}{side} {{\n"
            f'  name: "{self.name}"\n  data_type: TYPE_{self.kind}\n  dims: [ {self.size} ]\n{optional}}}\n'
        )


def _asked() -> tuple[Port, ...]:
    """What a client may send. Nothing is required of Triton: `preprocessing` says what lacks."""
    sizes = dict.fromkeys((*intake.STRING_LISTS, *intake.TOKEN_LISTS), -1)
    return tuple(Port(name, intake.input_type(name), sizes.get(name, 1), "", True) for name in intake.declared_inputs())


def _answered() -> tuple[Port, ...]:
    return tuple(Port(each.name, _KINDS[each.kind], 1, each.meaning) for each in outputs())


PROMPT = (Port("prompt_ids", "INT32", -1), Port("settings"))
PIECE = (Port("piece"),)


def ports() -> dict[str, tuple[tuple[Port, ...], tuple[Port, ...]]]:
    """Inputs and outputs, by model."""
    asked, answered = _asked(), _answered()
    return {
        "ensemble": (asked, answered),
        "preprocessing": (asked, PROMPT),
        "ssv": (PROMPT, PIECE),
        "postprocessing": (PIECE, answered),
        "ab_router": ((*asked, Port("ssv_user", meaning="who asks", is_optional=True)), answered),
    }


STEPS = ("preprocessing", "ssv", "postprocessing")
"""Of the ensemble: each takes what the one before gives, by the same names."""


def _scheduling() -> str:
    steps = []
    for model in STEPS:
        maps = zip(("input_map", "output_map"), ports()[model], strict=True)
        lines = [f'    {side} {{ key: "{port.name}" value: "{port.name}" }}\n' for side, its in maps for port in its]
        steps.append(f'  step {{\n    model_name: "{model}"\n    model_version: -1\n{"".join(lines)}  }}\n')
    return f"ensemble_scheduling {{\n{''.join(steps)}}}\n"


def written(model: str, text: str) -> str:
    """Returns a config file's text with the ports that its model has.

    Raises:
        ValueError: no part of it is marked for them.
    """
    before, begin, rest = text.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(f"{END}\n")
    if not (begin and end):
        raise ValueError(
            f"the config.pbtxt of {model} has no part for its ports: give it the lines {BEGIN!r} and {END!r}"
        )
    declared = [port.text(side) for side, of in zip(("input", "output"), ports()[model], strict=True) for port in of]
    scheduling = _scheduling() if model == "ensemble" else ""
    return "".join((before, begin, *declared, scheduling, end, after))


def main() -> int:
    """Writes the files in place."""
    for model in ports():
        path = HERE / model / "config.pbtxt"
        path.write_text(written(model, path.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
