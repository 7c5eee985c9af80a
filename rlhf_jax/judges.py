"""Judges say which of two completions of a prompt is better: a score, another program, or a language model.

A judge has a `name` and `wins(rows, ours, theirs) -> [N]`: 1 where ours is better, 0 where theirs is, .5 for a tie.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import queue
import shlex
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rlhf_jax import jsonfile
from rlhf_jax.errors import InputError, short

WINNERS = {"a": 1.0, "b": 0.0, "tie": 0.5}
KEY = "RLHF_JAX_JUDGE_KEY"  # the environment variable that may hold an endpoint's key
# The question of Rafailov et al. 2023 (arXiv 2305.18290), appendix C.1, in its concise form.
QUESTION = """\
Which of the following summaries does a better job of summarizing the most important points in the given forum post, \
without including unimportant or irrelevant details? A good summary is both precise and concise.

Post:
{prompt}

Summary A:
{a}

Summary B:
{b}

FIRST provide a one-sentence comparison of the two summaries, explaining which you prefer and why. SECOND, on a new \
line, state only "A" or "B" to indicate your choice. Your response should use the format:
Comparison: <one-sentence comparison and explanation>
Preferred: <"A" or "B">"""


class Judge(Protocol):
    """What `wins` means, and what the judge is called."""

    @property
    def name(self) -> str: ...

    def wins(self, rows: list[dict], ours: list[str], theirs: list[str]) -> np.ndarray:
        """[N] in [0, 1]. Raises InputError where the judge fails."""


@dataclasses.dataclass(frozen=True)
class Scored:
    """The text with the larger score wins."""

    name: str
    scores: Callable[[list[dict], list[str]], Any]  # (rows, texts) -> [N]

    def wins(self, rows: list[dict], ours: list[str], theirs: list[str]) -> np.ndarray:
        """As the protocol says; equal scores are a tie."""
        return (np.sign(np.asarray(self.scores(rows, ours)) - np.asarray(self.scores(rows, theirs))) + 1) / 2


class Answers:
    """Answers of a judge that takes time or money, kept in a JSONL file: a second run asks only what is missing."""

    def __init__(self, path: Path):
        self.path = path
        self.known: dict[str, Any] = {}
        if path.exists():
            for line in path.read_bytes().splitlines(keepends=True):
                if line.endswith(b"\n"):  # the last line may be half written
                    try:
                        row = jsonfile.parse(line.decode())
                        self.known[row["key"]] = row["answer"]
                    except (ValueError, TypeError, KeyError):
                        raise InputError(
                            f"judge: {path}: expected answers, got {short(str(line))}; remove it"
                        ) from None

    def keep(self, key: str, answer: Any) -> None:
        """Adds an answer to the file at once."""
        self.known[key] = answer
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            file.write((json.dumps({"key": key, "answer": answer}) + "\n").encode())


def _key(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Command:
    """Another program. It reads a JSON object a line, {"prompt", "a", "b"} and the row's other columns, and answers
    each with a line {"winner": "a", "b" or "tie"}. Which of the two is ours changes from row to row.
    """

    line: str
    answers: Answers
    seconds: float = 60.0  # that one answer may take

    @property
    def name(self) -> str:
        """The command line."""
        return self.line

    def wins(self, rows: list[dict], ours: list[str], theirs: list[str]) -> np.ndarray:
        """As the protocol says. What is answered is kept, whatever happens to the rest."""
        questions = [
            {key: value for key, value in row.items() if not key.startswith("_")} | {"a": a, "b": b}
            for row, a, b in zip(rows, *_alternating(ours, theirs), strict=True)
        ]
        keys = [_key(self.line, json.dumps(question, sort_keys=True, default=str)) for question in questions]
        missing = [i for i, key in enumerate(keys) if key not in self.answers.known]
        for i, line in zip(missing, self._run([questions[i] for i in missing]), strict=True):
            self.answers.keep(keys[i], _winner(line, f"judge {self.line}: answer {i + 1}"))
        return _as_ours([self.answers.known[key] for key in keys])

    def _run(self, questions: list[dict]) -> Iterator[str]:
        """Yields the program's line on each question. InputError where it ends early or is silent for too long."""
        if not questions:
            return
        try:
            command = shlex.split(self.line)
        except ValueError as error:
            raise InputError(f"judge: expected a command, got {self.line!r} ({error})") from None
        if not command or not shutil.which(command[0]):
            raise InputError(f"judge: expected a program that exists, got {self.line!r}")
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, errors="replace")
        assert process.stdin is not None and process.stdout is not None
        lines: queue.Queue = queue.Queue()

        def write(stream):
            with contextlib.suppress(OSError), stream:  # a program that has ended is reported below
                for question in questions:
                    stream.write(json.dumps(question, default=str) + "\n")
                    stream.flush()

        def read(stream):
            for line in stream:
                lines.put(line)
            lines.put(None)

        pairs = ((write, process.stdin), (read, process.stdout))
        threads = [threading.Thread(target=target, args=(stream,), daemon=True) for target, stream in pairs]
        for thread in threads:
            thread.start()
        try:
            for i in range(len(questions)):
                try:
                    line = lines.get(timeout=self.seconds)
                except queue.Empty:
                    raise InputError(f"judge {self.line}: expected an answer within {self.seconds:g} s") from None
                if line is None:
                    expected = f"expected {len(questions)} answers, got {i}; what is answered is kept"
                    raise InputError(f"judge {self.line}: {expected} (exit code {process.wait()})")
                yield line
        finally:
            process.kill()
            process.wait()
            for thread in threads:
                thread.join()
            process.stdout.close()


def _winner(line: str, where: str) -> str:
    try:
        answer = jsonfile.parse(line)["winner"]
    except (ValueError, TypeError, KeyError):
        answer = None
    if answer not in WINNERS:
        raise InputError(f'{where}: expected {{"winner": "a", "b" or "tie"}}, got {short(line.strip())!r}')
    return answer


def _alternating(ours, theirs):
    """(texts a, texts b): ours is a in even rows, b in odd ones, so that a judge of places is no judge of sides."""
    pairs = [(x, y) if i % 2 == 0 else (y, x) for i, (x, y) in enumerate(zip(ours, theirs, strict=True))]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _as_ours(winners):
    """[N]: 1 where the winner is ours, with sides as `_alternating` gives them."""
    values = np.array([WINNERS[winner] for winner in winners])
    return np.where(np.arange(len(values)) % 2 == 0, values, 1 - values)


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """A language model behind an OpenAI-compatible /chat/completions. Each pair is judged in both orders.

    Answers that disagree are a tie. `counts` says how often they did and how many answers could not be read. The key is
    read from the environment variable RLHF_JAX_JUDGE_KEY; it is never written.
    """

    url: str  # as http://127.0.0.1:8000/v1
    model: str
    answers: Answers
    seconds: float = 60.0  # that one answer may take
    counts: dict = dataclasses.field(default_factory=lambda: {"disagreed": 0, "unread": 0, "pairs": 0})

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model

    def wins(self, rows: list[dict], ours: list[str], theirs: list[str]) -> np.ndarray:
        """As the protocol says."""
        wins = []
        for row, x, y in zip(rows, ours, theirs, strict=True):
            first, second = self._ask(row["prompt"], x, y), self._ask(row["prompt"], y, x)
            self.counts["pairs"] += 1
            self.counts["unread"] += (first == "tie") + (second == "tie")
            self.counts["disagreed"] += first == second != "tie"
            wins.append({("a", "b"): 1.0, ("b", "a"): 0.0}.get((first, second), 0.5))
        return np.array(wins)

    def _ask(self, prompt, a, b) -> str:
        """ "a", "b", or "tie" where the answer names neither."""
        key = _key(self.url, self.model, QUESTION, prompt, a, b)
        if key not in self.answers.known:
            self.answers.keep(key, self._request(QUESTION.format(prompt=prompt, a=a, b=b)))
        last = self.answers.known[key].strip().splitlines()[-1:] or [""]
        letter = last[0].partition(":")[2].strip(" \"'.*") or last[0].strip(" \"'.*")
        return letter.lower() if letter in ("A", "B") else "tie"

    def _request(self, question) -> str:
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": question}]}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        url = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.seconds) as answer:
                return jsonfile.parse(answer.read().decode())["choices"][0]["message"]["content"] or ""
        except urllib.error.HTTPError as error:
            with error:
                raise InputError(f"judge {url}: HTTP {error.code}; what is answered is kept") from None
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise InputError(f"judge {url}: {short(str(error))}; what is answered is kept") from None
