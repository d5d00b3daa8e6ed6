"""Runs a plan: asks the arms, and writes down each answer as it comes."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from ssv.ab.answers import EndpointError, Sampling
from ssv.ab.arms import Arm
from ssv.ab.endpoints import Endpoint
from ssv.ab.journal import Journal
from ssv.ab.plan import Turn, seed_of
from ssv.ab.questions import Question
from ssv.ab.samples import Sample, answered
from ssv.support.errors import UserError
from ssv.support.interruptible import join
from ssv.support.progress import Report

MAX_FAILURES = 5
"""Requests of an arm that fail one after the other, beyond as many as run at the same time, end the run: the arm is
gone.
"""

MAX_ERROR = 500
"""Characters of an error that are kept."""


class ArmDown(UserError):
    """An arm does not answer."""


class LoadGenerator:
    """Workers, each with a connection of its own to every arm."""

    def __init__(
        self,
        arms: Sequence[Arm],
        questions: Sequence[Question],
        sampling: Sampling,
        *,
        seed: int,
        connect: Callable[[Arm], Endpoint],
    ) -> None:
        self._arms, self._questions, self._sampling, self._seed = arms, questions, sampling, seed
        self._connect = connect
        self._endpoints: dict[tuple[str, int], Endpoint] = {}
        self._failures = {arm.name: 0 for arm in arms}
        self._began = time.perf_counter()

    def warm_up(self, concurrency: int) -> None:
        """Asks every arm the first prompts, as many at once as it will be asked: what is slow only once is over
        afterwards.

        Raises:
            ArmDown: an arm does not answer; naming it.
        """
        for arm in self._arms:
            turn = Turn(concurrency, -1, arm.name, 0, tuple(i % len(self._questions) for i in range(concurrency)))
            failed = [sample for sample in self._run(turn, lambda sample: None) if sample.error]
            if len(failed) == concurrency:
                raise ArmDown(f"arm {arm.name} at {arm.url} does not answer: {failed[0].error}")
            self._failures[arm.name] = 0

    def run(self, plan: Sequence[Turn], journal: Journal, report: Report) -> list[Sample]:
        """Samples of the plan, each written to the journal before the next request of its worker.

        Raises:
            ArmDown: an arm has gone away; what was measured is in the journal.
        """
        samples: list[Sample] = []
        total = sum(len(turn.prompts) for turn in plan)
        warm: set[int] = set()
        lock = threading.Lock()
        is_over = False

        def keep(sample: Sample) -> None:
            with lock:
                if is_over:  # the journal may be closed, and its number another file's
                    return
                journal.append(sample.to_dict())
                samples.append(sample)
                speed = f"{sample.output_tokens / sample.e2e_s:.0f} tokens/s" if not sample.error else sample.error[:60]
                report("requests", len(samples), total, f"{sample.arm} x{sample.concurrency}: {speed}")

        try:
            for turn in plan:
                if turn.concurrency not in warm:
                    self.warm_up(turn.concurrency)
                    warm.add(turn.concurrency)
                self._run(turn, keep)
        finally:
            with lock:
                is_over = True
        return samples

    def close(self) -> None:
        """Closes the connections to all arms."""
        for endpoint in self._endpoints.values():
            endpoint.close()

    def disclosures(self) -> dict[str, dict[str, object] | None]:
        """What each arm says of its tiers."""
        return {arm.name: self._endpoint(arm.name, 0).disclosure() for arm in self._arms}

    def _run(self, turn: Turn, keep: Callable[[Sample], None]) -> list[Sample]:
        todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        for prompt in turn.prompts:
            todo.put(prompt)
        done: list[Sample] = []
        broken: list[BaseException] = []

        def work(number: int) -> None:
            try:
                endpoint = self._endpoint(turn.arm, number)
                with contextlib.suppress(queue.Empty):
                    while not broken:
                        sample = self._ask(endpoint, turn, self._questions[todo.get_nowait()])
                        done.append(sample)
                        keep(sample)
                        self._watch(sample)
            except BaseException as error:
                broken.append(error)

        threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(turn.concurrency)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                join(thread)
        except BaseException as error:
            broken.append(error)  # the workers ask nothing more
            raise
        if broken:
            raise broken[0]
        return done

    def _endpoint(self, arm: str, number: int) -> Endpoint:
        if (arm, number) not in self._endpoints:
            self._endpoints[arm, number] = self._connect(next(a for a in self._arms if a.name == arm))
        return self._endpoints[arm, number]

    def _ask(self, endpoint: Endpoint, turn: Turn, question: Question) -> Sample:
        seed = seed_of(self._seed, question.id, turn.repeat)
        planned: dict[str, Any] = {
            "arm": turn.arm,
            "concurrency": turn.concurrency,
            "block": turn.block,
            "repeat": turn.repeat,
            "prompt": question.id,
            "seed": seed,
        }
        start = time.perf_counter()
        try:
            answer = endpoint.ask(question.prompt, self._sampling, seed)
        except EndpointError as error:
            score = 0.0 if question.answers else None
            end = time.perf_counter()
            return Sample(
                **planned, start_s=start - self._began, end_s=end - self._began, error=_brief(error), score=score
            )
        end = time.perf_counter()
        return answered(planned, answer, start - self._began, end - self._began, question.score(answer.text))

    def _watch(self, sample: Sample) -> None:
        self._failures[sample.arm] = self._failures[sample.arm] + 1 if sample.error else 0
        if self._failures[sample.arm] > MAX_FAILURES + sample.concurrency:
            raise ArmDown(
                f"arm {sample.arm} has failed {self._failures[sample.arm]} times one after the other: {sample.error}"
            )


def _brief(error: Exception) -> str:
    """What an endpoint's error says, fit for terminals and files: it may be a page of HTML, or worse."""
    text = "".join(character if character.isprintable() else " " for character in str(error)[:MAX_ERROR])
    return text or type(error).__name__
