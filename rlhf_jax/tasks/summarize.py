"""Posts and their summaries: the embedded world, whose true reward is known, or Reddit TL;DR and its like."""

import dataclasses

import numpy as np

from rlhf_jax.rewards import gold
from rlhf_jax.tasks.prompts import Config, Prompts, unused
from rlhf_jax.tasks.task import Task

__all__ = ["Config", "Summarize", "make", "unused"]


@dataclasses.dataclass(frozen=True)
class Summarize(Prompts):
    """Posts in the TL;DR query format."""

    name = "summarize"

    def judge(self, rows, texts):
        """{"gold": the true reward of each text}; nothing where the rows have no record, as those of files."""
        return {"gold": np.array(gold.of_rows(rows, texts))} if self.config.source == "world" else {}


def make(config) -> Task:
    """The task of a whole config whose `task` is summarize."""
    return Summarize(config.data, config.seed)
