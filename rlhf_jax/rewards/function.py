"""Any Python function of texts, or of rows and texts, is a reward.

    def polite(texts):                          # list of N completions
        return [float("please" in text) for text in texts]

    def correct(rows, texts):                   # rows: the N rows of the data, with all their columns
        return [float(text.strip() == row["answer"]) for row, text in zip(rows, texts)]

It returns N numbers, or {component: N numbers}: then the reward is their sum, and each is logged under its name.
`--config.reward=path/to/file.py:polite` uses it; NAMED has the ones of this package.
"""

import contextlib
import functools
import hashlib
import importlib.machinery
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from rlhf_jax import hosts
from rlhf_jax.errors import STOPPED, InputError
from rlhf_jax.rewards import Completions, answers, gold, rouge, sentiment

NAMED: dict[str, Callable] = {
    "sentiment": sentiment.compound,
    "gold": gold.of_rows,
    "rouge": rouge.of_rows,
    "exact": answers.exact,
    "partial": answers.partial,
}


class Function:
    """A checked reward function, as a Reward that runs on the host."""

    metric, params, on_host = "reward", None, True

    def __init__(self, function: Callable, name: str, waiting: Callable = contextlib.nullcontext):
        """waiting(text): a context that says what is waited for, as report/console.py: Reporter.waiting."""
        self._function, self.name, self._waiting = function, name, waiting
        self.takes_rows = _takes_rows(function, name)

    def __call__(self, params: Any, completions: Completions) -> dict[str, np.ndarray]:
        """{"reward": [N]}, or {"reward_<component>": [N]} where the function returns several, float32."""
        return self.scores(completions.rows, completions.texts)

    def scores(self, rows, texts: list[str]) -> dict[str, np.ndarray]:
        """The same for rows and texts. A function of texts alone ignores the rows.

        Of several hosts, the first one computes it for all: a reward may cost money, or be another one the next time.
        Raises InputError, naming the function and the text's number, where it raises or its result is no reward.
        """
        if not hosts.several():
            return self._scores(rows, texts)
        found = hosts.from_first(lambda: {key: x.tolist() for key, x in self._scores(rows, texts).items()})
        return {key: np.array(x, np.float32) for key, x in found.items()}

    def _scores(self, rows, texts):
        args = (list(rows), list(texts)) if self.takes_rows else (list(texts),)
        try:
            with self._waiting(f"the reward of {len(texts)} texts"):
                scored = self._function(*args)
        except BaseException as error:
            _pass_on(error)
            code = getattr(self._function, "__code__", None)
            raise InputError(f"reward {self.name}: {_raised(error, code.co_filename if code else '')}") from error
        if not isinstance(scored, Mapping):
            return {self.metric: self._checked(scored, len(texts), "")}
        if not scored:
            raise InputError(f"reward {self.name}: expected at least one component, got none")
        return {f"reward_{name}": self._checked(part, len(texts), f", {name}") for name, part in scored.items()}

    def _checked(self, values, count: int, part: str) -> np.ndarray:
        where = f"reward {self.name}{part}"
        try:
            with np.errstate(over="ignore"):  # it becomes inf, which is refused below
                values_N = np.asarray(values, np.float32)
        except (TypeError, ValueError):
            raise InputError(f"{where}: expected {count} numbers, got {type(values).__name__}") from None
        if values_N.shape != (count,):
            raise InputError(f"{where}: expected {count} numbers, one a text; got shape {values_N.shape}")
        if not np.isfinite(values_N).all():
            i = int(np.argmin(np.isfinite(values_N)))
            raise InputError(f"{where}: expected finite numbers, got {values_N[i]} for text {i + 1} of {count}")
        return values_N


def load(spec: str, waiting: Callable = contextlib.nullcontext) -> Function:
    """The reward that a config names: one of NAMED, or "path/to/file.py:function". `waiting` as of a Function.

    Raises InputError for an unknown name, a missing file or function, or a file that does not import.
    """
    if spec in NAMED:
        return Function(NAMED[spec], spec, waiting)
    path, name = _split(spec)
    function = getattr(_module(path.absolute(), fingerprint(spec)), name, None)
    if not callable(function):
        raise InputError(f"reward: {path}: expected a function {name!r}, found none")
    return Function(function, spec, waiting)


def fingerprint(spec: str) -> str:
    """sha256 (hex) of the file that a reward is in; empty for those of this package."""
    return "" if spec in NAMED else hashlib.sha256(_split(spec)[0].read_bytes()).hexdigest()


def _split(spec: str) -> tuple[Path, str]:
    path, colon, name = spec.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise InputError(f"reward: expected learned, {', '.join(NAMED)} or path/to/file.py:function; got {spec!r}")
    if not Path(path).is_file():
        raise InputError(f"reward: {path}: no such file")
    return Path(path), name


@functools.cache
def _module(path: Path, sha256: str) -> ModuleType:
    """Imports the file like any module: it can import its neighbours, and its classes can be pickled.

    It is imported once; `sha256` is that of its contents, so that a changed file is imported again.
    """
    folder, name = str(path.parent), path.stem
    if folder not in sys.path:
        sys.path.append(folder)
    known = sys.modules.get(name) or importlib.machinery.PathFinder.find_spec(name)
    file = getattr(known, "__file__", None) or getattr(known, "origin", None)
    if known is not None and file != str(path):  # the name is another module's, as that of json.py is
        name = f"{name}_{hashlib.sha256(folder.encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        _pass_on(error)
        raise InputError(f"reward: {path}: {_raised(error, str(path))}") from error
    return module


def _pass_on(error: BaseException) -> None:
    """Raises what is not the function's fault: Ctrl-C and SIGTERM."""
    if isinstance(error, KeyboardInterrupt) or getattr(error, "exit_code", 0) == STOPPED:
        raise error


def _raised(error: BaseException, file: str) -> str:
    """What was raised and where: "ValueError: no (rules.py:12)", the last line in the file or in its neighbours."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    frames = [frame for frame in frames if "importlib" not in frame.filename]
    own = [frame for frame in frames if Path(frame.filename).parent == Path(file).parent] or frames
    where = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}{f': {message}' if message else ''}{where}"


def _takes_rows(function: Callable, name: str) -> bool:
    """Whether the function takes rows and texts: it has two parameters without a default.

    Raises InputError for one that can be called with neither texts nor rows and texts.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of a function in C
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [each for each in signature.parameters.values() if each.default is each.empty and each.kind in kinds]
    takes_rows = len(needed) == 2
    expected = f"reward {name}: expected a function of texts, or of rows and texts, got one of {signature}"
    try:
        signature.bind(*((), ()) if takes_rows else ((),))
    except TypeError:
        raise InputError(expected) from None
    if inspect.iscoroutinefunction(function):
        raise InputError(f"{expected}, async")
    return takes_rows
