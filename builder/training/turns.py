"""The turns of users in a corpus, as token ids, from what a recipe names."""

from __future__ import annotations

from ssv.builder.config import TrainingConfig
from ssv.builder.target import Target, openings_of
from ssv.builder.training.corpus import Turns
from ssv.builder.training.templates import make_turns

_LONGEST = 0.5
"""Share of a window that a whole turn may take: what is longer leaves too little for an answer."""


def turns_of(config: TrainingConfig, target: Target, num_kept: int = 0) -> tuple[Turns, Turns]:
    """Turns for a corpus, and such as are kept, the templates of which are used for nothing else.

    Raises:
        UserError: a file cannot be read or used.
    """
    openings = openings_of(config.openings_file, target)
    if config.prompts_file is None:
        return Turns(openings), Turns(openings)
    made = make_turns(config.prompts_file, config.num_prompts, 4 * num_kept, config.seed)
    encoder = target.conversation_encoder()

    def ids(texts: list[str]) -> list[list[int]]:
        found = (encoder.text_ids(text) for text in texts)
        return [tokens for tokens in found if tokens and len(tokens) <= _LONGEST * config.window]

    later, kept = ids(made.later), ids(made.kept)
    return Turns(openings, ids(made.first), later), Turns((), kept, later) if kept else Turns(openings)
