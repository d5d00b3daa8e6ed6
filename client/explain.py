"""How an answer came about, in the terminal: a line for each pass of the target, a mark and a colour for each token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from ssv.runtime.fates import FateEntry
from ssv.runtime.request import Fate

MOST_BRANCHES = 3
"""That are shown of what was dropped in one place."""

_MARKS: dict[Fate, tuple[str, str, str]] = {
    "accepted": ("+", "green", "drafted, and the target's choice"),
    "typical": ("%", "cyan", "drafted, and typical of the target"),
    "trusted": ("~", "yellow", "drafted, and trusted: the target never judged it"),
    "corrected": ("!", "magenta", "the target's choice in place of what was drafted"),
    "target": (".", "", "the target's choice where nothing was drafted"),
}
"""Of each fate: its mark, its colour, and what it means."""


class Explanation:
    """Shows tokens as they come."""

    def __init__(self, console: Console | None = None) -> None:
        """Begins with nothing to show.

        Args:
            console: None for stdout.
        """
        self._console = console or Console(highlight=False)
        self._line: list[FateEntry] = []
        self._counts: Counter[Fate] = Counter()

    def push(self, entries: Sequence[FateEntry]) -> None:
        """Takes tokens; shows the passes that are complete."""
        for entry in entries:
            if self._line and entry["pass"] != self._line[-1]["pass"]:
                self._show()
            self._line.append(entry)
            self._counts[entry["fate"]] += 1

    def close(self, target_passes: int, bound: str) -> None:
        """Shows the rest, what the marks mean, and what was saved.

        Args:
            bound: what is said of how far the text may be from the target's.
        """
        self._show()
        for fate, (mark, colour, meaning) in _MARKS.items():
            if count := self._counts[fate]:
                self._print(Text(f"{mark} {count:4} {meaning}", colour))
        num_tokens = self._counts.total()
        saved = max(num_tokens - 1 - target_passes, 0)  # the prompt's own pass gives the first token
        share = f" ({saved / (num_tokens - 1):.0%})" if num_tokens > 1 else ""
        self._print(Text(f"{num_tokens} tokens, {target_passes} passes of the target: {saved} saved{share}; {bound}"))

    def _show(self) -> None:
        if not self._line:
            return
        text = Text(f"{self._line[0]['pass']:4} ")
        for entry in self._line:
            mark, colour, _ = _MARKS[entry["fate"]]
            text.append(f" {mark}{_visible(entry['token'])}", colour)
            if branches := entry["dropped"]:
                more = len(branches) - MOST_BRANCHES
                shown = ["/".join(map(_visible, each)) for each in branches[:MOST_BRANCHES]]
                shown += [f"{more} more"] if more > 0 else []
                text.append(f"[{'|'.join(shown)}]", "bright_black")
        self._print(text)
        self._line = []

    def _print(self, text: Text) -> None:
        self._console.print(text, soft_wrap=True)


def _visible(text: str) -> str:
    """A token's text, of which spaces and what cannot be printed are to be seen."""
    return "".join("·" if char == " " else char if char.isprintable() else repr(char)[1:-1] for char in text)
