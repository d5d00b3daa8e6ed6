"""Tasks of the harness: found by name or file, run with a model, and what each document scored."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssv.support.errors import UserError

if TYPE_CHECKING:
    from ssv.ab.evaluation.harness import SsvModel

SEED = 1234
"""Of the examples that stand before a question: the harness's own."""


@dataclass(frozen=True, slots=True)
class Task:
    """What is shown as one task: a task of the harness, or all of a group's.

    Attributes:
        tasks: the harness's objects.
        generates: whether any of them has texts generated; if not, likelihoods are all that is asked for.
    """

    name: str
    tasks: tuple[Any, ...]
    chat: bool

    @property
    def generates(self) -> bool:
        """Whether any of it has texts generated, so that the method of decoding matters."""
        return any(task.get_config("output_type") == "generate_until" for task in self.tasks)


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What a method did in a task.

    Attributes:
        metric: the first that the task names, of its first filter.
        value: as the harness aggregates it; of a group, the mean over its documents. None where neither is a number.
        scores: by document, where each has one from 0 to 1 of which more is better; otherwise none.
        responses: by document.
    """

    metric: str
    value: float | None
    scores: Mapping[str, float]
    responses: Mapping[str, Any]


class TaskFinder:
    """Finds tasks by name, or by the path of a YAML file."""

    def __init__(self, include_path: Path | None) -> None:
        """Prepares the harness to look for tasks.

        Args:
            include_path: a folder with tasks of the user's own, beside the harness's.
        """
        # Both say on stderr what is no concern of whoever compares methods.
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        os.environ.setdefault("TQDM_DISABLE", "1")
        from datasets import disable_progress_bars

        disable_progress_bars()
        self._include_path = None if include_path is None else str(include_path)
        self._own = self._manager(include_defaults=False)

    def find(self, spec: str | dict[str, Any], *, chat: bool) -> Task:
        """Loads a task and its data.

        Args:
            spec: a name, a path, or a configuration.
            chat: whether its prompts are put into the chat template.

        Raises:
            UserError: it is unknown, cannot be loaded, or runs programs without protection.
        """
        name = spec["task"] if isinstance(spec, dict) else spec
        try:
            loaded = self._load(spec)
        except KeyError as error:
            raise UserError(
                f"the task {name!r} is unknown",
                "give the name of one of lm-eval's, of one in --include-path, or the path of a YAML file",
            ) from error
        except Exception as error:  # whatever a task's author and the library of its data let them raise
            raise UserError(f"the task {name!r} cannot be loaded ({type(error).__name__}: {error})") from error
        if unsafe := [task for task, each in loaded.items() if getattr(each, "UNSAFE_CODE", False)]:
            raise UserError(
                f"the task {unsafe[0]} runs programs that a model wrote, without protection",
                "leave it out; HumanEval is run safely with --humaneval",
            )
        title = next(iter(loaded)) if len(loaded) == 1 else str(name)
        return Task(title, tuple(loaded.values()), chat)

    def _load(self, spec: str | dict[str, Any]) -> dict[str, Any]:
        """The harness's objects, by name. Its own tasks are looked at last: to find them takes half a minute."""
        try:
            found = self._own.load([spec])
        except KeyError:
            found = self._all.load([spec])
        return dict(found["tasks"])

    @cached_property
    def _all(self) -> Any:
        return self._manager(include_defaults=True)

    def _manager(self, *, include_defaults: bool) -> Any:
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=self._include_path, include_defaults=include_defaults)


def run_task(task: Task, model: SsvModel, *, limit: int | None, num_fewshot: int | None) -> TaskResult:
    """Runs a task.

    Args:
        limit: documents of each of the harness's tasks; None for all.
        num_fewshot: examples before each; None for as many as the task says.

    Raises:
        RequestError: see `SsvModel`.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model=model,
        tasks=list(task.tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        bootstrap_iters=0,  # intervals are of differences, and ours
        apply_chat_template=task.chat,
        fewshot_random_seed=SEED,
        torch_random_seed=None,
        task_manager=TaskManager(include_defaults=False),  # it makes one that looks at all its tasks otherwise
    )
    assert found is not None
    scores: dict[str, float] = {}
    responses: dict[str, Any] = {}
    names, can_judge = set(), True
    for name, samples in found["samples"].items():
        metric, filter_name = samples[0]["metrics"][0], samples[0]["filter"]
        names.add(metric)
        higher = found["higher_is_better"].get(name, {}).get(metric)
        for sample in samples:
            if sample["filter"] != filter_name:
                continue
            key = f"{name}/{sample['doc_id']}"
            responses[key] = sample["filtered_resps"]
            score = _share(sample[metric])
            can_judge = can_judge and higher is True and score is not None
            scores[key] = score if score is not None else 0.0
    if not can_judge:
        scores = {}
    return TaskResult(" / ".join(sorted(names)), _value(found, scores), scores, responses)


def _value(found: Mapping[str, Any], scores: Mapping[str, float]) -> float | None:
    if scores:
        return sum(scores.values()) / len(scores)
    if len(found["samples"]) > 1:
        return None
    ((name, samples),) = found["samples"].items()
    value = found["results"][name].get(f"{samples[0]['metrics'][0]},{samples[0]['filter']}")
    return float(value) if isinstance(value, int | float) else None


def _share(value: Any) -> float | None:
    """A document's score, if it is a number from 0 to 1."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if 0 <= number <= 1 else None


def missing_packages(names: Sequence[str]) -> list[str]:
    """Those that are not installed."""
    import importlib.util

    return [name for name in names if importlib.util.find_spec(name) is None]
