"""Who proposes tokens: one file each, one line each."""

from __future__ import annotations

from torch import Tensor

from ssv.bundle.survival import Survival
from ssv.runtime.decode.drafters.contract import Drafter
from ssv.runtime.decode.drafters.heads import HeadsDrafter
from ssv.runtime.decode.drafters.lookahead import Lookahead
from ssv.runtime.decode.drafters.model import ModelDrafter
from ssv.runtime.decode.drafters.prompt_lookup import PromptLookup
from ssv.runtime.decode.drafters.suffix import Suffix
from ssv.runtime.decode.row import Row
from ssv.runtime.engines.contract import Engine, HeadsEngine


class Drafters(dict[str, Drafter]):
    """Drafters by the name that a policy has for them (`ssv.bundle.policy.Policy.drafter`)."""

    def of(self, row: Row) -> Drafter | None:
        """Who drafts for a row; None of one that does not draft."""
        return self[row.policy.drafter] if row.policy.max_pending and not row.has_lost_draft else None


def drafters(
    target: Engine,
    draft: Engine | None,
    eos_ids: Tensor,
    survival: Survival,
    heads: HeadsEngine | None = None,
    prompts: Engine | None = None,
) -> Drafters:
    """The drafters that there are.

    Args:
        prompts: the draft's engine for prompts, where it has one of its own.
    """
    eos_set = frozenset(eos_ids.tolist())
    found = Drafters()
    found["prompt-lookup"] = PromptLookup(eos_set)
    found["suffix"] = Suffix(eos_set)
    found["lookahead"] = Lookahead(eos_set)
    if draft is not None:
        found["model"] = ModelDrafter(target, draft, eos_ids, survival, Suffix(eos_set), prompts)
    if heads is not None:
        found["heads"] = HeadsDrafter(heads, eos_ids)  # `survival` is of the draft's shares
    return found
