"""Any Python function of texts, or of rows and texts, is a reward.

    def polite(texts):                          # list of N completions
        return [float("please" in text) for text in texts]

    def correct(rows, texts):                   # rows: the N rows of the data, with all their columns
        return [float(text.strip() == row["answer"]) for row, text in zip(rows, texts)]

It returns N numbers, or {component: N numbers}: then the reward is their sum, and each is logged under its name.
`--config.reward=path/to/file.py:polite` uses it; NAMED has the ones of this package.
"""

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

from rlhf_jax.errors import InputError
from rlhf_jax.rewards import Completions, gold, sentiment

NAMED: dict[str, Callable] = {"sentiment": sentiment.compound, "gold": gold.of_rows}


class Function:
    """A checked reward function, as a Reward that runs on the host."""

    metric, params, on_host = "reward", None, True

    def __init__(self, function: Callable, name: str):
        self._function, self.name = function, name
        self.takes_rows = _takes_rows(function)

    def __call__(self, params: Any, completions: Completions) -> dict[str, np.ndarray]:
        """{"reward": [N]}, or {"reward_<component>": [N]} where the function returns several, float32."""
        return self.scores(completions.rows, completions.texts)

    def scores(self, rows, texts: list[str]) -> dict[str, np.ndarray]:
        """The same for rows and texts. A function of texts alone ignores the rows.

        Raises InputError, naming the function and the text's number, where it raises or its result is no reward.
        """
        args = (list(rows), list(texts)) if self.takes_rows else (list(texts),)
        try:
            scored = self._function(*args)
        except (Exception, SystemExit) as error:
            raise InputError(f"reward {self.name}: {_raised(error)}") from error
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


def load(spec: str) -> Function:
    """The reward that a config names: one of NAMED, or "path/to/file.py:function".

    Raises InputError for an unknown name, a missing file or function, or a file that does not import.
    """
    if spec in NAMED:
        return Function(NAMED[spec], spec)
    path, name = _split(spec)
    function = getattr(_module(path.absolute(), fingerprint(spec)), name, None)
    if not callable(function):
        raise InputError(f"reward: {path}: expected a function {name!r}, found none")
    return Function(function, spec)


def fingerprint(spec: str) -> str:
    """sha256 (hex) of the file that a reward is in; empty for those of this package."""
    return "" if spec in NAMED else hashlib.sha256(_split(spec)[0].read_bytes()).hexdigest()


def _split(spec: str) -> tuple[Path, str]:
    path, colon, name = spec.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise InputError(f"reward: expected learned, {' or '.join(NAMED)}, or path/to/file.py:function; got {spec!r}")
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
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise InputError(f"reward: {path}: {_raised(error)}") from error
    return module


def _raised(error: BaseException) -> str:
    """What was raised and where: "ValueError: no (rules.py:12)"."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    own = [frame for frame in frames if "importlib" not in frame.filename]
    where = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {error}{where}"


def _takes_rows(function: Callable) -> bool:
    """Whether the function takes rows and texts: it has two parameters without a default."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(needed) == 2
