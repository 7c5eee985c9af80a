"""A finished run, a folder of transformers or a model of the hub as one value: texts, log-probs and scores.

    model = rlhf_jax.load("runs/demo")
    texts = model.generate(prompt, n=4)
    nats = model.logprobs(prompt, texts)
    scores = model.scores(prompt, texts)

Prompts and completions become ids as in the runs: a prompt is its ids, and a completion is a space, its text without
space around it, and EOS. An empty prompt is EOS, which stands before every plain text; after it a completion is its
text as it is, and EOS.
"""

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import generate, hub, jsonfile, rollout, text
from rlhf_jax.data import tldr
from rlhf_jax.errors import InputError
from rlhf_jax.generate import Token
from rlhf_jax.models import decoder, heads, hf, hf_config, hf_layout, lora
from rlhf_jax.text import chat, files

FILES = tuple((*weights, *tokenizer) for tokenizer in files.FILES for weights in hf.FILES)  # of transformers
SCORE = "score.weight"  # the array that only a reward model has

ROWS = (1, 4, 32)  # on the device at a time: each number is compiled for
NARROWEST = 16  # tokens
MAX_TOKENS = 64  # of a completion, where no run says how long its own are


Prompts = str | Sequence[str | list[chat.Message]] | list[chat.Message]  # one text or conversation, or several


class Sample(NamedTuple):
    """A completion as it was sampled."""

    text: str  # without space around it
    ids: list[int]  # EOS included
    logp_R: np.ndarray  # of each id, in nats, under the distribution that it was sampled from
    ended: bool  # by EOS, not cut at max_tokens


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """A language model, a reward model or both, of the same sizes, with their tokenizer. Nothing in it changes.

    The first call for a new number of tokens, rows or a new way to sample compiles: seconds for a small model. Prompts
    are padded to a few widths, so that others of about the same length do not compile again.
    """

    config: decoder.Config
    tokenizer: text.Tokenizer
    apply: rollout.Apply  # the functions of the parameters
    params: dict | None = dataclasses.field(repr=False)  # the policy's; None: there is only a reward model
    reward: dict | None = dataclasses.field(repr=False)  # the reward model's; None: there is none
    max_tokens: int = MAX_TOKENS  # of a completion, EOS included, unless `generate` is given another number

    @property
    def context(self) -> int:
        """The most tokens that a prompt and its completion can have together."""
        return self.config.context

    def generate(
        self,
        prompts: Prompts,
        *,
        n: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """n completions of each prompt, in one list: first those of the first prompt. A str is one prompt.

        A conversation, a list of messages {"role", "content"}, is a prompt where the tokenizer has a chat template.

        A completion ends at EOS or after max_tokens, EOS included. Temperature 0 takes the most likely token; top_k = 0
        and top_p = 1 sample from all. The same arguments give the same texts. Space around a text is dropped.

        InputError where a prompt and max_tokens are more than the context.
        """
        ids = self._prompts([prompts] if _is_one(prompts) else prompts)
        how: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        return [sample.text for sample in self.sample(ids, n=n, max_tokens=max_tokens, seed=seed, **how)]

    def sample(
        self,
        prompts: Sequence[list[int]],
        *,
        n: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        first: int = 0,
    ) -> list[Sample]:
        """As `generate`, from the ids of the prompts, and with ids and log-probs.

        prompts[i] gets the noise of prompt first + i, so a long list may be completed part by part.
        """
        if not prompts:
            return []
        how = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        drawn = self._draw(prompts, n, max_tokens, seed, how, first)
        texts, eos_ids = text.responses(self.tokenizer, *drawn[:2]), self.tokenizer.eos_ids
        rows = zip(texts, *drawn, strict=True)
        return [
            Sample(words, ids[mask].tolist(), logp_R[mask], bool(ids[mask][-1] in eos_ids))
            for words, ids, mask, logp_R in rows
        ]

    def stream(
        self,
        prompt: list[int],
        *,
        beside: Sequence[dict] = (),
        n: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        first: int = 0,
        forced: Sequence[int] = (),
    ) -> Iterator[Token]:
        """Yields the tokens of n completions of a prompt's ids, place by place: the completions that `sample` gives.

        beside: parameters of other policies. Each has n rows after those of this policy, sampled with the same noise,
        and every policy reads all rows. Rows begin with the ids `forced`. Settings do not compile again, except n.
        """
        how: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        R, params_M = self._checked([prompt], n, max_tokens, seed, how), (self.params, *beside)
        lanes = next((size for size in ROWS if size >= n), n)
        key = jax.random.fold_in(jax.random.key(seed), first)
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, np.tile(np.arange(lanes), len(params_M)))
        prompt_1P, mask_1P = self._padded([prompt], self._width([prompt]))
        return generate.stream(
            self.apply.policy, params_M, np.repeat(np.arange(len(params_M)), lanes), prompt_1P, mask_1P, keys_B,
            generate.How(**how), rows_B=np.tile(np.arange(lanes) < n, len(params_M)), max_tokens=R,
            eos_ids=self.tokenizer.eos_ids, slots=self.context, forced=forced,
        )  # fmt: skip

    def logprobs(self, prompts: Prompts, completions: Sequence[str], *, temperature: float = 1.0) -> list[np.ndarray]:
        """Log-probs [R] of the tokens of each completion after its prompt, in nats. A str is the prompt of them all.

        The tokens are those of " " + completion.strip(), or of the completion as it is after an empty prompt; then EOS,
        which is always the last. So a text that `generate` had to cut is taken for one that ends there.

        InputError where a prompt and its completion are more than the context.
        """
        _expect(temperature > 0, "temperature", "more than 0", temperature)
        starts, ends = self._pairs(prompts, completions)
        return self.logprob_tokens(starts, ends, temperature)

    def scores(self, prompts: Prompts, completions: Sequence[str]) -> np.ndarray:
        """The reward model's score of each completion, read at its EOS; tokens are as for `logprobs`.

        InputError where there is no reward model.
        """
        if self.reward is None:
            raise InputError("scores: expected a reward model; a run has one when its reward stage is finished")
        starts, ends = self._pairs(prompts, completions)
        return self.score_tokens([start + end for start, end in zip(starts, ends, strict=True)])

    def score_tokens(self, rows: Sequence[list[int]]) -> np.ndarray:
        """The reward model's score of each row of ids, prompt and completion, read at its last one."""
        if not rows:
            return np.zeros(0, np.float32)
        score = functools.partial(_score, self.apply.scalar, self.reward)
        return _over(score, *self._padded(rows, self._width(rows)))

    def with_policy(self, params: dict) -> "Pretrained":
        """The same with other parameters of the policy, as a trained stage has them: `fitted.state.policy`."""
        return dataclasses.replace(self, params=params)

    def sft(self, rows: Sequence[dict], **config: Any):
        """The Stage that fine-tunes this policy on rows {"prompt", "label"}, for rlhf_jax.fit.

        `config` has fields of config.Supervised (steps, lr, batch, ...) and of tasks.prompts.Given (cut, ...).
        """
        from rlhf_jax.config import Supervised
        from rlhf_jax.stages.language_model import language_model

        setup, section = self._setup({"sft": rows, "prompts": rows}, Supervised, {"loss_on": "response"} | config)
        return language_model("sft", setup, section, self.params)

    def rl(self, rows: Sequence[dict], reward: Callable | None = None, *, algorithm: str = "ppo", **config: Any):
        """The Stage that improves this policy on rows {"prompt", ...} by a reward, for rlhf_jax.fit.

        reward: a function of texts, or of rows and texts, as in rewards/function.py; None: this model's reward model.
        `config` has fields of the algorithm's Config (steps, lr, batch, ...) and of tasks.prompts.Given.
        """
        from rlhf_jax.algorithms import POLICY
        from rlhf_jax.rewards import Reward, function, learned
        from rlhf_jax.stages.rl import rl

        _expect(algorithm in POLICY, "algorithm", " or ".join(POLICY), algorithm)
        if reward is None and self.reward is None:
            raise InputError("reward: expected a function, as this model has no reward model")
        setup, section = self._setup({"prompts": rows}, POLICY[algorithm].Config, {"temperature": 1.0} | config)
        _expect(not section.ptx_coef, "ptx_coef", "0, as rows of prompts have no other texts", section.ptx_coef)
        scored: Reward
        if reward is None:
            scored = learned.Learned(self.apply, self.reward, setup.sampling(section.temperature))
        else:
            scored = function.Function(reward, getattr(reward, "__name__", "reward"))
        value = self.apply.scalar.zero_head(self.params) if self.reward is None else self.reward
        return rl(algorithm, setup, section, POLICY[algorithm], scored, self.params, value=value)

    def _setup(self, rows, kind, config):
        """(Setup, section of the config) of a stage on these rows; `config` has fields of both."""
        from rlhf_jax import fields
        from rlhf_jax.config import Evaluation
        from rlhf_jax.stages import Setup
        from rlhf_jax.tasks.prompts import Given

        self._policy("training")
        known = {field.name for field in dataclasses.fields(Given)}
        task = {name: config.pop(name) for name in sorted(known & config.keys())}
        seed = config.pop("seed", 1)
        try:
            section = kind(**config)
        except TypeError as error:
            raise InputError(f"config: {str(error).split('() ')[-1]}") from None
        fields.check(section)
        lengths = {"response_length": self.max_tokens, "prompt_length": self.context - self.max_tokens}
        given = Given(**{"rows_by_kind": rows, "seed": seed} | lengths | task)
        evaluation = Evaluation(temperature=1.0, samples=0)
        return Setup(seed, given, self.tokenizer, self.apply, evaluation), section

    def _draw(self, prompts, n, max_tokens, seed, how, first=0):
        """(response ids, mask, log-probs), each [N, R], of n samples of each of the prompts' ids, one after another."""
        R = self._checked(prompts, n, max_tokens, seed, how)
        # The noise of a sample is its own: it does not depend on the other prompts, nor on n.
        key, sample_N = jax.random.key(seed), jnp.arange(len(prompts) * n)
        keys_N = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, first + i // n), i % n))(sample_N)
        width = _width(max(map(len, prompts)), self.context - R)
        arrays = self._padded([ids for ids in prompts for _ in range(n)], width)
        eos_id, *more = self.tokenizer.eos_ids
        sampling = generate.Sampling(R, eos_id, self.tokenizer.pad_id, more_eos=tuple(more), **how)
        return _over(functools.partial(_sample, self.apply.policy, sampling, self.params), *arrays, keys_N)

    def _checked(self, prompts, n, max_tokens, seed, how):
        """The most tokens of a completion. InputError for what cannot be sampled."""
        self._policy("generate")
        R = self.max_tokens if max_tokens is None else max_tokens
        _expect(n >= 1, "n", "at least 1", n)
        _expect(1 <= R < self.context, "max_tokens", f"1 to {self.context - 1}, the context is {self.context}", R)
        _expect(how["temperature"] >= 0, "temperature", "0 or more", how["temperature"])
        _expect(how["top_k"] >= 0, "top_k", "0 (all) or more", how["top_k"])
        _expect(0 < how["top_p"] <= 1, "top_p", "more than 0 and at most 1 (all)", how["top_p"])
        _expect(0 <= seed < 2**32, "seed", "0 to 2^32 - 1", seed)
        limit = self.context - R
        for i, ids in enumerate(prompts):
            if len(ids) > limit:
                most = f"at most {limit} tokens, the context of {self.context} without max_tokens = {R}"
                raise InputError(f"prompts[{i}]: expected {most}, got {len(ids)}")
        return R

    def logprob_tokens(
        self, prompts: Sequence[list[int]], completions: Sequence[list[int]], temperature: float = 1.0
    ) -> list[np.ndarray]:
        """Log-probs [R] of the ids of each completion after those of its prompt, in nats."""
        self._policy("logprobs")
        rows = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        if not rows:
            return []
        width = self._width(rows)
        # Prompt and completion stand at the right edge together: no row is wider than the context.
        R = _width(max(map(len, completions)), width - 1)
        logprobs = functools.partial(_logprobs, self.apply.policy, R, self.params, temperature)
        logp_NR = _over(logprobs, *self._padded(rows, width))
        return [logp_R[R - len(ids) :] for logp_R, ids in zip(logp_NR, completions, strict=True)]

    def _policy(self, name):
        if self.params is None:
            raise InputError(f"{name}: expected a policy, there is only a reward model")

    def _prompts(self, prompts):
        """The ids of each prompt."""
        return [self._ids(prompt, f"prompts[{i}]") or [self.tokenizer.eos_id] for i, prompt in enumerate(prompts)]

    def _pairs(self, prompts, completions):
        """(ids of each prompt, ids of each completion)."""
        if isinstance(completions, str):
            raise InputError("completions: expected a list of texts, got one text")
        prompts = [prompts] * len(completions) if _is_one(prompts) else prompts
        if len(prompts) != len(completions):
            raise InputError(f"completions: expected one for each of {len(prompts)} prompts, got {len(completions)}")
        starts, ends = self._prompts(prompts), []
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            ends.append(self._ids(completion, f"completions[{i}]", after=prompt))
        for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
            if len(start) + len(end) > self.context:
                most = f"at most {self.context} tokens with prompts[{i}], the context, got {len(start)} + {len(end)}"
                raise InputError(f"completions[{i}]: expected {most}")
        return starts, ends

    def _ids(self, value, name, after=None):
        """The ids of a prompt; or, `after` a prompt, of its completion, EOS included."""
        is_chat = after is None and isinstance(value, list)
        if not isinstance(value, str) and not is_chat:
            raise InputError(f"{name}: expected a text, got {type(value).__name__}")
        try:
            if is_chat:
                return chat.prompt(self.tokenizer, value)
            if isinstance(after, list):
                return chat.answer(self.tokenizer, after, value)
            if after is None:
                return self.tokenizer.begin + self.tokenizer.encode(value)
            form = tldr.completion(value, self.tokenizer.space) if after else value
            return [*self.tokenizer.encode(form), self.tokenizer.eos_id]
        except InputError as error:
            raise InputError(f"{name}: {error}") from None

    def _width(self, rows):
        return _width(max(map(len, rows)), self.context)

    def _padded(self, rows, width):
        """(ids, mask), each [N, width], of rows padded on the left."""
        tokens_NT = np.full((len(rows), width), self.tokenizer.pad_id, np.int32)
        mask_NT = np.arange(width) >= width - np.array([len(ids) for ids in rows], np.int32)[:, None]
        for i, ids in enumerate(rows):
            tokens_NT[i, width - len(ids) :] = ids
        return tokens_NT, mask_NT


def load(source: str | os.PathLike, stage: str = "") -> Pretrained:
    """A model by where it is.

    - The folder of a run: the policy of its last finished stage, or of `stage`, and the reward model where the run has
      one. stage="reward" is that model alone, and "judge" the hold-out judge. Of a run with several seeds, the first.
    - A folder that experiments/export_hf.py or transformers wrote, with safetensors of a GPT-2 or GPT-NeoX and their
      tokenizer; or the name of one on the hub: NAME or NAME@REVISION. A ...ForSequenceClassification with one label is
      a reward model. Where the tokenizer has no PAD, its row in the embedding is the mean row.

    InputError says in one line what is missing or cannot be read.
    """
    source = os.path.expanduser(source)
    path = Path(source)
    if path.is_file():
        raise InputError(f"{source}: expected a folder or a name on the hub, got a file")
    if is_run(path):
        return _from_run(path, stage)
    if stage:
        raise InputError(f"stage: expected none, as {source} is not the folder of a run, got {stage!r}")
    return _from_transformers(hub.folder(source, *FILES, also=files.ALSO))


def _is_one(prompts: Prompts) -> bool:
    """Whether this is one prompt, a text or a conversation, and not a list of them."""
    return isinstance(prompts, str) or (isinstance(prompts, list) and bool(prompts) and isinstance(prompts[0], dict))


def is_run(folder: Path) -> bool:
    """Whether the folder has the config of a run, which has a section `model`; those of transformers have none."""
    try:
        section = jsonfile.read(folder / "config.json").get("model")
    except InputError:
        section = None
    return isinstance(section, dict) or (folder / "lock").exists()  # a run's, also where its config is damaged


def _from_run(folder: Path, stage: str) -> Pretrained:
    from rlhf_jax import checkpoint  # Orbax: half a second
    from rlhf_jax import config as configs

    config = configs.read(folder)
    names = configs.stages(config)
    if stage and stage not in names:
        raise InputError(f"stage: expected {' or '.join(names)}, got {stage!r}")
    places = {name: configs.place(config, folder, name) / name for name in names}
    finished = [name for name, place in places.items() if (place / "summary.json").exists()]
    if stage and stage not in finished:
        raise InputError(f"stage: expected a finished one ({', '.join(finished) or 'there is none'}), got {stage!r}")
    policies = [name for name in finished if name not in configs.REWARD_MODELS]
    if not stage and not policies:
        raise InputError(f"{folder}: expected a run with a finished stage that has a policy; there is none yet")
    stage, tokenizer = stage or policies[-1], text.load(folder / "text")
    scorer = "judge" if stage == "judge" else "reward"

    model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or tokenizer.vocab_size)

    def read(name, field):
        with _quiet():
            return whole(checkpoint.load(places[name])[field], config, model, places[name])

    return _made(
        model,
        tokenizer,
        params=None if stage in configs.REWARD_MODELS else read(stage, "policy"),
        reward=read(scorer, "reward") if scorer in finished else None,
        max_tokens=config.data.response_length,
    )


def whole(params: Any, config: Any, model: decoder.Config, stage: Path) -> Any:
    """Parameters of a stage's result, with adapters (config.lora) added to their base. The stage is its folder.

    InputError where the base is not the one that the adapters were trained on.
    """
    if not config.lora.rank:
        return params
    base = base_of(config, model, stage)
    if "head" not in params:
        return lora.merge(base, params, config.lora)
    base.pop("unembed", None)
    return {**params, "trunk": lora.merge(base, params["trunk"], config.lora)}


def base_of(config: Any, model: decoder.Config, stage: Path) -> dict:
    """The parameters that the adapters of a stage, a folder, stand on: those of model.init. Raises InputError."""
    from rlhf_jax import provenance

    init = config.model.init
    record = jsonfile.read(stage / "config.json", "what the stage's numbers depend on")
    was = record.get("sha256", {}).get(f"model.init = {init}")
    try:
        now = provenance.digest(Path(init))
        if was != now:
            raise InputError(
                f"{init}: expected the base that the adapters in {stage} were trained on, with sha256 {was}, got {now}"
            )
        return hf.load(hf.find(init), model)
    except InputError as error:
        raise InputError(f"model.init: {error}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax warns that what it reads is read only."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _from_transformers(folder: Path) -> Pretrained:
    config, tokenizer = hf_config.read(folder), files.from_files(folder)
    config = dataclasses.replace(config, vocab_size=max(config.vocab_size, tokenizer.vocab_size))
    arrays = hf.read(folder)
    if SCORE not in map(hf_layout.unwrapped, arrays):
        return _made(config, tokenizer, params=hf.load(folder, config), reward=None, max_tokens=_longest(folder))
    try:
        return _made(config, tokenizer, params=None, reward=hf.scalar_from_hf(arrays, config))
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None


def _longest(folder: Path) -> int:
    """The most tokens of a completion that generation_config.json names; MAX_TOKENS where it names none."""
    path = folder / "generation_config.json"
    most = jsonfile.read(path, "the settings of generation").get("max_new_tokens") if path.exists() else None
    return most if isinstance(most, int) and most > 0 else MAX_TOKENS


def _made(config, tokenizer, params, reward, max_tokens=MAX_TOKENS) -> Pretrained:
    apply = rollout.Apply(heads.LanguageModel(config, ids=tokenizer.vocab_size), heads.ScalarModel(config))
    params, reward = jax.device_put((params, reward))
    return Pretrained(config, tokenizer, apply, params, reward, min(max_tokens, config.context - 1))


def _width(longest: int, limit: int) -> int:
    """A power of 2 that holds the longest row, or the limit: few widths, as each of them is compiled for."""
    return min(max(NARROWEST, 1 << (longest - 1).bit_length()), limit)


def _over(function: Callable, *arrays: Any) -> Any:
    """function(arrays) over their first axis, some rows at a time: NumPy results by row.

    The last rows are filled up from the first, and what that adds is cut off: there are few numbers of rows.
    """
    total = len(arrays[0])
    size = next((size for size in ROWS if size >= total), ROWS[-1])
    parts = []
    for start in range(0, total, size):
        rows = np.arange(start, start + size) % total
        parts.append(jax.device_get(function(*(array[rows] for array in arrays))))
    return jax.tree.map(lambda *x: np.concatenate(x)[:total], *parts)


def _expect(fine: bool, name: str, expected: str, value: Any) -> None:
    if not fine:
        raise InputError(f"{name}: expected {expected}, got {value!r}")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sample(model, sampling, params, prompt_BP, mask_BP, keys_B):
    drawn = generate.generate(model, params, prompt_BP, mask_BP, keys_B, sampling)
    return drawn.response_BR, drawn.mask_BR, drawn.logp_BR


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logprobs(model, count, params, temperature, tokens_BT, mask_BT):
    return model.logprobs(params, tokens_BT, mask_BT, count, temperature=temperature)


@functools.partial(jax.jit, static_argnums=0)
def _score(model, params, tokens_BT, mask_BT):
    return model.score(params, tokens_BT, mask_BT)
