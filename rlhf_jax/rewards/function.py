"""Any Python function of texts is a reward.

    def polite(texts):                          # list of N completions
        return [float("please" in text) for text in texts]

It returns N numbers, or {component: N numbers}: then the reward is their sum, and each is logged under its name.
`--config.reward=path/to/file.py:polite` uses it; a bare name is a function of this package (NAMED).
"""

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from rlhf_jax.errors import InputError
from rlhf_jax.rewards import sentiment

NAMED = {"sentiment": sentiment.compound}


class Reward:
    """A checked reward function: reward(texts) -> (rewards [N] float32, {component: [N]})."""

    def __init__(self, function: Callable, name: str):
        self._function, self._name = function, name

    def __call__(self, texts: list[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Raises InputError, naming the function and the text's number, where it raises or its result is no reward."""
        try:
            scored = self._function(list(texts))
        except Exception as error:
            raise InputError(f"reward {self._name}: {type(error).__name__}: {error}") from error
        if isinstance(scored, Mapping):
            parts = {str(name): self._checked(values, len(texts), f", {name}") for name, values in scored.items()}
            if not parts:
                raise InputError(f"reward {self._name}: expected at least one component, got none")
            return np.sum(list(parts.values()), axis=0), parts
        return self._checked(scored, len(texts), ""), {}

    def _checked(self, values, count: int, part: str) -> np.ndarray:
        where = f"reward {self._name}{part}"
        try:
            values_N = np.asarray(values, np.float32)
        except (TypeError, ValueError):
            raise InputError(f"{where}: expected {count} numbers, got {type(values).__name__}") from None
        if values_N.shape != (count,):
            raise InputError(f"{where}: expected {count} numbers, one a text; got shape {values_N.shape}")
        if not np.isfinite(values_N).all():
            i = int(np.argmin(np.isfinite(values_N)))
            raise InputError(f"{where}: expected finite numbers, got {values_N[i]} for text {i + 1} of {count}")
        return values_N


def load(spec: str) -> Reward:
    """The reward that a config names: one of NAMED, or "path/to/file.py:function".

    Raises InputError for an unknown name, a missing file or function, or a file that does not import.
    """
    if spec in NAMED:
        return Reward(NAMED[spec], spec)
    path, colon, name = spec.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise InputError(f"reward: expected {' or '.join(NAMED)}, or path/to/file.py:function; got {spec!r}")
    if not Path(path).is_file():
        raise InputError(f"reward: {path}: no such file")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"reward: {path}: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"reward: {path}: expected a function {name!r}, found none")
    return Reward(function, spec)
