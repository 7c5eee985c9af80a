"""Rewards score completions. A learned reward, the known truth, sentiment and any function have one signature."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from rlhf_jax.rollout import Rollout


@dataclasses.dataclass(frozen=True)
class Completions:
    """A rollout as a reward sees it: tokens on the device, and texts, which are decoded on first use."""

    rows: Sequence[dict]  # of the data, one a completion
    rollout: Rollout
    decode: Callable[[Any, Any], list[str]]  # (response_BR, mask_BR) -> texts

    @functools.cached_property
    def texts(self) -> list[str]:
        """The completions as texts, without the space that they begin with."""
        return self.decode(self.rollout.response_BR, self.rollout.mask_BR)


class Reward(Protocol):
    """A frozen value that scores completions.

    `params` is what it needs of a TrainState (`state.reward`), or None. `metric` names the total in the logs: "score"
    of a learned reward, "reward" of a function. A reward that runs on the host also has `scores(rows, texts)` and waits
    for the texts.
    """

    @property
    def name(self) -> str: ...

    @property
    def metric(self) -> str: ...

    @property
    def on_host(self) -> bool: ...

    @property
    def params(self) -> Any: ...

    def __call__(self, params: Any, completions: Completions) -> dict[str, Any]:
        """{component: [B]}; the reward is their sum. Raises InputError, naming the function and the row at fault."""


def total(components: dict[str, Any]) -> Any:
    """The reward [B]: the sum of its components."""
    first, *rest = components.values()
    return sum(rest, start=first)
