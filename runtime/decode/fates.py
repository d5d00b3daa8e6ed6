"""How the tokens of a round came into the output, and what was dropped in their places.

Shapes: N nodes of a row's tree, J = N + 1 rows of the target.
"""

from __future__ import annotations

from collections.abc import Sequence

from ssv.runtime.decode.tree import ROOT, Tree
from ssv.runtime.request import Fate, TokenFate


def fates_of(
    tree: Tree,
    path: Sequence[int],
    choice_J: Sequence[int | None],
    target_pass: int,
    next_token: int | None = None,
    *,
    told: int = 0,
) -> list[TokenFate]:
    """The fates of what a round adds to the output.

    Args:
        path: nodes that are kept, from the root on.
        choice_J: of the target; None where it is not judged.
        next_token: the target's choice after them; None where it is not known yet.
        told: nodes of the path whose fates have been told.
    """
    dropped = _dropped(tree, path)
    fates: list[TokenFate] = []
    for node in path[told:]:
        parent, token = tree.parents[node], tree.tokens[node]
        choice = choice_J[parent + 1]
        fate: Fate = "trusted" if choice is None else "accepted" if choice == token else "typical"
        fates.append(TokenFate(token, fate, target_pass, tree.risks[node], tuple(dropped.get(parent, ()))))
    if next_token is not None:
        instead = tuple(dropped.get(path[-1] if path else ROOT, ()))
        fates.append(TokenFate(next_token, "corrected" if instead else "target", target_pass, None, instead))
    return fates


def _dropped(tree: Tree, path: Sequence[int]) -> dict[int, list[tuple[int, ...]]]:
    """Branches that a path leaves aside, each to its end, by the node of the path (or ROOT) that they follow."""
    kept, inner = set(path), set(tree.parents)
    found: dict[int, list[tuple[int, ...]]] = {}
    for leaf in range(len(tree)):
        if leaf in inner or leaf in kept:
            continue
        branch = [node for node in tree.path(leaf) if node not in kept]
        found.setdefault(tree.parents[branch[0]], []).append(tuple(tree.tokens[node] for node in branch))
    return found
