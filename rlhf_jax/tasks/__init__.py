"""What is learned on, one task a file: a `Config` of its data, `make(config)` and `unused(config)` of a whole config.

A task is a frozen value, made without side effects. Rows are read on first use; notes say what was cut or skipped.
Kinds of rows: "pretrain" (plain texts), "sft" (prompt and label), "preferences" (prompt, chosen, rejected), "prompts".
"""

from rlhf_jax.tasks import arithmetic, prompts, summarize, write
from rlhf_jax.tasks.task import Encoded, Rows, Task

__all__ = ["TASKS", "Encoded", "Rows", "Task", "load"]

# What a config's `task` chooses from.
TASKS = {"summarize": summarize, "write": write, "prompts": prompts, "arithmetic": arithmetic}


def load(config) -> Task:
    """The task of a whole config."""
    return TASKS[config.task].make(config)
