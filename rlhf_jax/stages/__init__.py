"""A stage is a value made of values: its first state, its compiled step, its evaluation and its result.

training/fit.py trains a stage. language_model.py, preference.py and rl.py make them; nothing here writes or prints.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax import generate, hosts, text
from rlhf_jax.data import batches
from rlhf_jax.errors import InputError
from rlhf_jax.rollout import Apply
from rlhf_jax.tasks import Encoded, Task
from rlhf_jax.text import Tokenizer
from rlhf_jax.training import guard as guards
from rlhf_jax.training import optim, sharding

# The index is folded into the seed: append only; reordering changes the numbers of old runs.
PURPOSES = (
    *("policy init", "reward head", "evaluation", "pretrain", "sft", "reward", "rl"),
    *("pretrain order", "sft order", "reward order", "rl order"),  # of the rows that a stage trains on
    "ptx order",  # of the texts beside the completions
    *("judge", "judge head", "judge order"),
)


class Times(NamedTuple):
    """When the host saw parts of an iteration end: seconds on the clock of time.monotonic."""

    before: float  # the update before it
    collected: float  # sampling
    rewarded: float  # scoring


class Step(NamedTuple):
    """What one step of a stage returns."""

    state: Any
    numbers: dict  # {name: scalar}, without the stage's name
    rollout: Any = None  # what the update read, if not the batch
    notes: tuple[str, ...] = ()
    record: dict | None = None  # for a trace: {part: {name: array}}; see viz/recorder.py
    times: Times | None = None  # of an iteration of reinforcement learning


class Evaluation(NamedTuple):
    """What a policy or a reward model is worth on held-out rows."""

    numbers: dict  # {name: float}; in the logs, each has `eval_` before its name
    details: Any = None  # what the stage's `summarize` reads
    samples: tuple[dict, ...] = ()  # completions to show during training
    record: dict | None = None  # for a trace: {part: {name: array}}, and rows of texts


class Summary(NamedTuple):
    """What a finished stage writes in addition to its parameters."""

    numbers: dict  # {name: number or nested}, without the stage's name
    samples: list[dict]
    plot: Callable[[list[dict], Any, str], dict]  # (rows of metrics, folder, name of the run) -> numbers of these rows
    table: tuple = ()  # rows (name, before, after, change, its 95% interval)


@dataclasses.dataclass(frozen=True)
class Stage:
    """What training/fit.py trains."""

    name: str
    config: Any  # steps, batch, eval_every, save_every, schedule
    state: Any  # at step 0
    batch_at: Callable[[int], dict]  # step (from 0) -> its batch on the device; depends only on seed and step
    step: Callable[..., Step]  # (state, batch), and record=True for Step.record; may donate the state
    learn: Callable  # the compiled update alone: (state, batch or rollout) -> (state, numbers)
    evaluate: Callable[[Any], Evaluation]
    best: tuple[str, Callable]  # the number of an evaluation that ranks checkpoints, and its better direction
    result: tuple[str, ...]  # fields of the state that are saved as its result
    summarize: Callable[[Any, Evaluation], Summary]  # (state, its last evaluation) -> Summary
    headlines: tuple[str, ...] = ()  # numbers of the summary that are shown at the end
    eligible: Callable = lambda numbers: True  # whether a checkpoint with this evaluation may be one of the best
    first: Evaluation | None = None  # of the state at step 0, where it is known already
    keep: Callable | None = None  # (state, Evaluation) -> state, with a copy of the best policy
    complete: Callable | None = None  # (last state, its Evaluation) -> (state of the result, numbers)
    frozen: tuple[str, ...] = ()  # fields that no step changes; checkpoints leave them out
    guard: guards.Config = guards.Config()

    @functools.cached_property
    def lr(self) -> np.ndarray:
        """The learning rate of each optimizer step."""
        return optim.rates(self.config, getattr(self.config, "updates", self.config.steps))

    def tokens(self, batch: dict, numbers: dict) -> float:
        """Real tokens of a step: those of its batch, and those of the completions where it has sampled some.

        Of several hosts, those of this one's rows, as if all had as many: nothing is sent for it.
        """
        masks = [sharding.rows_here(array) for name, array in batch.items() if "mask" in name]
        rows = next(len(array) for name, array in batch.items() if "mask" in name)
        here = sum(int(mask.sum()) for mask in masks) * rows / len(masks[0])
        return here + rows * float(numbers.get("length", 0))


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """The values that the stages of a run share."""

    seed: int
    task: Task
    tokenizer: Tokenizer
    apply: Apply
    evaluation: Any  # config.Evaluation
    guard: guards.Config = guards.Config()
    mesh: Any = dataclasses.field(default_factory=sharding.mesh)
    jit: Callable = jax.jit  # for the mesh; replay.py gives another one, to check every operation
    record: bool = False  # compiled updates return their arrays too, for a trace

    def __post_init__(self):
        object.__setattr__(self, "jit", functools.partial(sharding.jit, mesh=self.mesh, jit=self.jit))

    @functools.cache  # noqa: B019 (a setup lives as long as its run)
    def arrays(self, kind: str) -> Encoded:
        """(train, held-out) arrays of a kind of rows."""
        return self.task.arrays(kind, self.tokenizer)

    def title(self, run: str, stage: str) -> str:
        """The title of a stage's plots."""
        return f"{run}: {stage} on {self.task.name}"

    def questions(self, kind: str) -> tuple[dict, list[dict]]:
        """(arrays, rows) of the held-out prompts that evaluate a stage which trains on this kind."""
        kind = self.task.questions[kind]
        arrays, rows = self.arrays(kind).held_out, self.task.rows(kind).held_out
        return arrays, [rows[i] for i in arrays["index_N"][: self.evaluation.prompts]]

    def key(self, purpose: str) -> jax.Array:
        """The random key of one of PURPOSES."""
        return jax.random.fold_in(jax.random.key(self.seed), PURPOSES.index(purpose))

    def batch_at(
        self, kind: str, batch: int, stage: str, field: str, group: int = 1, more: dict | None = None, only=None
    ) -> Callable[[int], dict]:
        """A stage's batches on the devices, in its own order; each row `group` times, next to each other.

        `more` has other arrays of the same rows. only: the places of the rows to use; None: all. An error names the
        config's `field`.
        """
        arrays = self.arrays(kind).train | (more or {})
        arrays = arrays if only is None else {name: array[only] for name, array in arrays.items()}
        if batch > (rows := len(arrays["index_N"]) * group):
            named = "the number of training rows" if group == 1 else f"the number of training rows x group = {group}"
            raise InputError(f"{field}: expected at most {rows}, {named}, got {batch}")
        seed = int(jax.random.randint(self.key(f"{stage} order"), (), 0, 2**31 - 1))
        at = batches.batch_at(arrays, batch=batch // group, seed=seed)

        def repeated(step):
            batch = at(step)
            return batch if group == 1 else {name: np.repeat(array, group, axis=0) for name, array in batch.items()}

        return lambda step: sharding.shard(repeated(step), self.mesh)

    def sampling(self, temperature: float, **changes: Any) -> generate.Sampling:
        """How responses are sampled, with `changes` of the other fields of a Sampling."""
        return generate.Sampling(
            max_tokens=self.task.response_length,
            eos_id=self.tokenizer.eos_id,
            pad_id=self.tokenizer.pad_id,
            more_eos=self.tokenizer.eos_ids[1:],
            temperature=temperature,
            **changes,
        )

    def decode(self, response_BR, mask_BR) -> list[str]:
        """Responses as texts, without the space that they begin with."""
        return text.responses(self.tokenizer, *sharding.gather((response_BR, mask_BR)))

    def over(self, arrays: dict, function: Callable, rows: int | None = None) -> Any:
        """function(batch) over the first `rows` rows (default: all), a device batch at a time: NumPy results by row.

        All batches have one shape: the last one is filled up with the first rows, and their results are dropped.
        """
        count = rows or len(arrays["index_N"])
        size = min(self.evaluation.batch, count)
        size += -size % sharding.shards(self.mesh)
        parts = []
        for start in range(0, count, size):
            hosts.pause()
            batch = batches.take(arrays, np.arange(start, start + size) % count)
            parts.append(sharding.gather(function(sharding.shard(batch, self.mesh))))
        return jax.tree.map(lambda *x: np.concatenate(x)[:count], *parts)


def row_keys(key, batch):
    """A key for each held-out row [B], the same in any batch, so that two policies get the same noise for a prompt."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, batch["index_B"])
