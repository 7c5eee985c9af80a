"""Sampling completions: read the prompts, then one decode step at a time, in a compiled loop or streamed.

The compiled loop runs `start` and `advance`. A second one runs `enter` and `proceed`: it completes N prompts in fewer
lanes, and a lane whose completion has ended takes the next prompt from a queue (continuous batching: Yu et al. 2022,
Orca, section 3). `stream` is a Python loop for the playground: it yields every token, and compares several models.
Randomness belongs to a prompt's row: token i of row b is sampled with fold_in(keys_B[b], i), whatever else is in the
batch.
"""

import dataclasses
import functools
import operator
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.ops import kl, logprobs, padding, sampling

CANDIDATES = 8  # most likely tokens that `stream` yields
GROUPS = 4  # with lanes: prompts are read once a quarter of the lanes is free


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How completions are sampled."""

    max_tokens: int  # R, EOS included
    eos_id: int  # ends a completion
    pad_id: int
    temperature: float = 1.0  # 0: the most likely token
    top_k: int = 0  # 0: all. Evaluation and playground only
    top_p: float = 1.0  # 1: all. Evaluation and playground only
    lanes: int = 0  # completions generated at once, a divisor of their number; 0: all
    widths: int = 1  # number of prompt widths that the reading of prompts is compiled for; see ops/padding.py
    group: int = 1  # rows next to each other that complete one prompt: it is read once for all of them
    more_eos: tuple[int, ...] = ()  # further ids that end a completion, as some models have

    def ends(self, token_B):
        """Whether each token ends its completion [B]."""
        return ends(token_B, (self.eos_id, *self.more_eos))


def ends(token_B, eos_ids):
    """Whether each token is one of the ids that end a completion [B]."""
    return functools.reduce(operator.or_, (token_B == id for id in eos_ids))


@flax.struct.dataclass
class State:
    """Everything the decode step needs. Columns < step of the `_BR` arrays are filled."""

    step: jax.Array  # () int32, response tokens sampled so far
    done_B: jax.Array  # the row has sampled EOS
    keys_B: jax.Array
    cache: object
    response_BR: jax.Array  # PAD after EOS
    mask_BR: jax.Array  # 1 up to and including EOS
    logp_BR: jax.Array  # of each token under the distribution it was sampled from; 0 after EOS
    hidden_BRD: jax.Array  # the hidden state that each token was sampled from


def start(model, params, prompt_BP, prompt_mask_BP, keys_B, config):
    """Reads the prompts and samples the first token of each row."""
    B, P = prompt_BP.shape
    R = config.max_tokens
    hidden_BD, cache = _read_groups(model, params, prompt_BP, prompt_mask_BP, P + R, config.group)
    state = State(
        step=jnp.zeros((), jnp.int32),
        done_B=jnp.zeros(B, bool),
        keys_B=keys_B,
        cache=cache,
        response_BR=jnp.full((B, R), config.pad_id, jnp.int32),
        mask_BR=jnp.zeros((B, R), bool),
        logp_BR=jnp.zeros((B, R), jnp.float32),
        hidden_BRD=jnp.zeros((B, R, hidden_BD.shape[-1]), hidden_BD.dtype),
    )
    return _draw(model, params, hidden_BD, state, config)


def _read_groups(model, params, prompt_BP, prompt_mask_BP, slots, group):
    """model.prefill of the first prompt of each group, repeated for its rows. Rows are the first axis of a cache."""
    found = model.prefill(params, prompt_BP[::group], prompt_mask_BP[::group], slots)
    return found if group == 1 else jax.tree.map(lambda x: jnp.repeat(x, group, axis=0) if jnp.ndim(x) else x, found)


def advance(model, params, state, config):
    """Reads the last token of each row and samples the next one in rows that have not ended."""
    token_B = jax.lax.dynamic_index_in_dim(state.response_BR, state.step - 1, axis=1, keepdims=False)
    hidden_BD, cache = model.decode(params, token_B, ~state.done_B, state.cache)
    return _draw(model, params, hidden_BD, state.replace(cache=cache), config)


def _draw(model, params, hidden_BD, state, config):
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(state.keys_B, state.step)
    token_B, logp_B = _tokens(model, params, hidden_BD, keys_B, config)
    alive_B = ~state.done_B

    def write(array_BR, column_B):
        return jax.lax.dynamic_update_index_in_dim(array_BR, column_B, state.step, axis=1)

    return state.replace(
        step=state.step + 1,
        done_B=state.done_B | config.ends(token_B),
        response_BR=write(state.response_BR, jnp.where(alive_B, token_B, config.pad_id)),
        mask_BR=write(state.mask_BR, alive_B),
        logp_BR=write(state.logp_BR, jnp.where(alive_B, logp_B, 0)),
        hidden_BRD=write(state.hidden_BRD, hidden_BD),
    )


def _tokens(model, params, hidden_BD, keys_B, config):
    """(tokens [B] sampled from the hidden states, their log-probs [B]), each with its key."""

    def draw(key, logits_V):
        return sampling.draw(key, logits_V, temperature=config.temperature, k=config.top_k, p=config.top_p)

    return jax.vmap(draw)(keys_B, model.logits(params, hidden_BD))


def generate(model, params, prompt_BP, prompt_mask_BP, keys_B, config):
    """Completes every prompt and returns the final State. One while loop, which ends when every row has ended.

    With lanes the State has no cache, and its step counts the decode steps of all lanes.
    """
    params = model.cast(params)  # once, not at every token
    if 0 < config.lanes < len(prompt_BP):
        return _from_queue(model, params, prompt_BP, prompt_mask_BP, keys_B, config)

    def unfinished(state):
        return (state.step < config.max_tokens) & ~jnp.all(state.done_B)

    state = start(model, params, prompt_BP, prompt_mask_BP, keys_B, config)
    return jax.lax.while_loop(unfinished, lambda state: advance(model, params, state, config), state)


@flax.struct.dataclass
class Lanes:
    """The completions in progress, one per lane: lane b has sampled count_B[b] tokens of prompt row_B[b], of N."""

    drawn: State  # of all N prompts, with the lanes' cache; its step counts the lanes' decode steps
    queue_N: jax.Array  # prompt rows sorted by length: prompts read together are of similar length
    taken: jax.Array  # () int32, number of prompts taken from the queue
    row_B: jax.Array  # N: the lane is free
    count_B: jax.Array
    token_B: jax.Array  # the last token sampled


def _from_queue(model, params, prompt_NP, prompt_mask_NP, keys_N, config):
    """Completes every prompt in config.lanes lanes and returns the final State, without a cache.

    Prompts are read in groups, once enough lanes are free: one at a time would be slow. Rows that complete one prompt
    are in one of these, as the queue keeps rows of equal length in their order. Raises ValueError unless the number of
    lanes divides the number of rows, and config.group divides it.
    """
    N, P = prompt_NP.shape
    B, R = config.lanes, config.max_tokens
    if N % B:
        raise ValueError(f"lanes: expected a divisor of {N} prompts, got {B}")
    if B % config.group:
        raise ValueError(f"lanes: expected a multiple of group = {config.group}, got {B}")
    sizes = range(config.group, max(B // GROUPS, config.group) + 1, config.group)
    group = max(size for size in sizes if B % size == 0)

    def may_enter(lanes):
        """A group is in the queue, and enough lanes are free."""
        return (lanes.taken < N) & (jnp.sum(lanes.row_B == N) >= group)

    def step(lanes):
        lanes = enter(model, params, prompt_NP, prompt_mask_NP, lanes, config, group)
        return jax.lax.while_loop(
            lambda lanes: jnp.any(lanes.row_B < N) & ~may_enter(lanes),
            lambda lanes: proceed(model, params, lanes, config, P),
            lanes,
        )

    def empty(shape, dtype):
        return jnp.zeros(shape, dtype)

    # Empty arrays, in the shapes of a prefill of all lanes.
    read = jax.eval_shape(lambda: model.prefill(params, prompt_NP[:B], prompt_mask_NP[:B], P + R))
    hidden, cache = jax.tree.map(lambda x: empty(x.shape, x.dtype), read)
    drawn = State(
        step=empty((), jnp.int32),
        done_B=empty(N, bool),
        keys_B=keys_N,
        cache=cache,
        response_BR=jnp.full((N, R), config.pad_id, jnp.int32),
        mask_BR=empty((N, R), bool),
        logp_BR=empty((N, R), jnp.float32),
        hidden_BRD=empty((N, R, hidden.shape[-1]), hidden.dtype),
    )
    lanes = Lanes(
        drawn=drawn,
        queue_N=jnp.argsort(jnp.sum(prompt_mask_NP, axis=1)).astype(jnp.int32),
        taken=empty((), jnp.int32),
        row_B=jnp.full(B, N, jnp.int32),
        count_B=empty(B, jnp.int32),
        token_B=empty(B, jnp.int32),
    )
    lanes = jax.lax.while_loop(lambda lanes: lanes.taken < N, step, lanes)
    return dataclasses.replace(lanes.drawn, cache=None)


def enter(model, params, prompt_NP, prompt_mask_NP, lanes, config, group):
    """Reads the next `group` prompts into free lanes (there must be enough) and samples their first tokens."""
    N, P = prompt_NP.shape
    row_G = jax.lax.dynamic_slice_in_dim(lanes.queue_N, lanes.taken, group)

    def prefill(prompt_GP, mask_GP):
        return _read_groups(model, params, prompt_GP, mask_GP, P + config.max_tokens, config.group)

    hidden_GD, new = padding.cut(prefill, prompt_NP[row_G], prompt_mask_NP[row_G], config.widths)
    lane_G = jnp.argsort(lanes.row_B < N)[:group]  # free lanes first
    drawn, token_G, goes_on_G = _draw_rows(model, params, hidden_GD, row_G, 0, lanes.drawn, config)
    return lanes.replace(
        drawn=drawn.replace(cache=model.insert(drawn.cache, new, lane_G)),
        taken=lanes.taken + group,
        row_B=lanes.row_B.at[lane_G].set(jnp.where(goes_on_G, row_G, N)),
        count_B=lanes.count_B.at[lane_G].set(1),
        token_B=lanes.token_B.at[lane_G].set(token_G),
    )


def proceed(model, params, lanes, config, prompt_length):
    """Reads the last token of each lane and samples the next one."""
    drawn, R = lanes.drawn, config.max_tokens
    alive_B = lanes.row_B < len(drawn.done_B)
    # All lanes write to one slot of the cache. It is reused after R steps: completions that needed it have ended.
    slot = prompt_length + drawn.step % R
    hidden_BD, cache = model.decode(params, lanes.token_B, alive_B, drawn.cache, slot)
    drawn = drawn.replace(cache=cache, step=drawn.step + 1)
    drawn, token_B, goes_on_B = _draw_rows(model, params, hidden_BD, lanes.row_B, lanes.count_B, drawn, config)
    row_B = jnp.where(goes_on_B, lanes.row_B, len(drawn.done_B))
    return lanes.replace(drawn=drawn, row_B=row_B, count_B=lanes.count_B + 1, token_B=token_B)


def _draw_rows(model, params, hidden_GD, row_G, count_G, drawn, config):
    """Samples token count_G of rows row_G: (State, tokens [G], whether each row goes on [G]). Row N: a free lane."""
    count_G = jnp.broadcast_to(count_G, row_G.shape)
    keys_G = jax.vmap(jax.random.fold_in)(drawn.keys_B[row_G], count_G)
    token_G, logp_G = _tokens(model, params, hidden_GD, keys_G, config)
    ended_G = config.ends(token_G)

    def write(array_NR, column_G):
        return array_NR.at[row_G, count_G].set(column_G, mode="drop")

    drawn = drawn.replace(
        done_B=drawn.done_B.at[row_G].set(ended_G, mode="drop"),
        response_BR=write(drawn.response_BR, token_G),
        mask_BR=write(drawn.mask_BR, True),
        logp_BR=write(drawn.logp_BR, logp_G),
        hidden_BRD=write(drawn.hidden_BRD, hidden_GD),
    )
    return drawn, token_G, (row_G < len(drawn.done_B)) & ~ended_G & (count_G + 1 < config.max_tokens)


class How(NamedTuple):
    """How `stream` samples: arguments of its compiled steps, so that other numbers compile nothing."""

    temperature: float = 1.0  # 0: the most likely token
    top_k: int = 0  # 0: all
    top_p: float = 1.0  # 1: all


@flax.struct.dataclass
class Token:
    """A token of each row, and how likely M models find it after the tokens before it.

    Log-probs and KL are in nats, of the whole vocabulary at the temperature; at temperature 0 they are those of 1.
    """

    token_B: jax.Array
    mask_B: jax.Array  # 0 where the row has ended before this token
    logp_MB: jax.Array
    kl_B: jax.Array  # exact KL(last model || first model) over the vocabulary
    best_MBC: jax.Array  # the ids that each model finds most likely, in order
    best_logp_MBC: jax.Array


def stream(
    model, params_M, source_B, prompt_1P, prompt_mask_1P, keys_B, how,
    *, rows_B, max_tokens, eos_ids, slots, forced=(),
):  # fmt: skip
    """Yields the next Token of each row, as NumPy arrays, until all rows have ended or have max_tokens tokens.

    The rows complete one left-padded prompt. Row b is sampled from the model with parameters params_M[source_B[b]], and
    every model reads every row. Token i of row b is sampled as in `generate`, with fold_in(keys_B[b], i): rows with the
    same key get the same noise, and differ only where their models do. The first tokens are those of `forced`, if any.
    Rows where rows_B is 0 only fill up the batch: they are not sampled, and not yielded.

    The caches have `slots` slots: at least the prompt's columns, and the tokens of the prompt and the completion.
    """
    read = jax.jit(_read_prompt, static_argnums=0, static_argnames="slots")
    step = jax.jit(_read_token, static_argnums=0, donate_argnames="caches_M")
    how = jax.tree.map(np.asarray, How(float(how.temperature), int(how.top_k), float(how.top_p)))
    mask_B, token_B, caches_M = np.array(rows_B, bool), None, None
    for i in range(max_tokens):
        args = source_B, keys_B, np.int32(i), np.int32(forced[i] if i < len(forced) else -1), how
        if i == 0:
            token, caches_M = read(model, params_M, prompt_1P, prompt_mask_1P, *args, slots=slots)
        else:
            token, caches_M = step(model, params_M, token_B, mask_B, caches_M, *args)
        token_B, here = token.token_B, jax.device_get(token).replace(mask_B=mask_B)
        yield here if rows_B.all() else _of_rows(here, rows_B)
        mask_B = mask_B & ~ends(here.token_B, eos_ids)
        if not mask_B.any():
            return


def _of_rows(token, rows_B):
    """The Token of the rows where rows_B is 1."""
    return Token(
        token_B=token.token_B[rows_B],
        mask_B=token.mask_B[rows_B],
        logp_MB=token.logp_MB[:, rows_B],
        kl_B=token.kl_B[rows_B],
        best_MBC=token.best_MBC[:, rows_B],
        best_logp_MBC=token.best_logp_MBC[:, rows_B],
    )


def _read_prompt(model, params_M, prompt_1P, mask_1P, source_B, keys_B, i, forced, how, *, slots):
    """(the first Token of each row, the caches of each model)."""
    rows, padding = len(source_B), mask_1P.shape[1] - jnp.sum(mask_1P)
    hidden_M, caches_M = [], []
    for params in params_M:
        hidden_1D, cache = model.prefill(params, prompt_1P, mask_1P, slots)
        hidden_M.append(jnp.repeat(hidden_1D, rows, axis=0))
        caches_M.append(model.repeat(cache, rows, padding))
    return _choose(model, params_M, hidden_M, source_B, keys_B, i, forced, how), tuple(caches_M)


def _read_token(model, params_M, token_B, mask_B, caches_M, source_B, keys_B, i, forced, how):
    """(Token i of each row, the caches of each model)."""
    pairs = zip(params_M, caches_M, strict=True)
    hidden_M, caches_M = zip(*(model.decode(params, token_B, mask_B, cache) for params, cache in pairs), strict=True)
    return _choose(model, params_M, hidden_M, source_B, keys_B, i, forced, how), caches_M


def _choose(model, params_M, hidden_M, source_B, keys_B, i, forced, how):
    scale = jnp.where(how.temperature > 0, how.temperature, 1)
    pairs = zip(params_M, hidden_M, strict=True)
    logits_MBV = jnp.stack([logprobs.scale(model.logits(params, hidden_BD), scale) for params, hidden_BD in pairs])
    own_BV = logits_MBV[source_B, jnp.arange(len(source_B))]
    kept_BV = jax.vmap(sampling.keep, (0, None, None))(own_BV, how.top_k, how.top_p)
    sampled_B = jax.vmap(jax.random.categorical)(jax.vmap(jax.random.fold_in, (0, None))(keys_B, i), kept_BV)
    token_B = jnp.where(how.temperature > 0, sampled_B, jnp.argmax(own_BV, axis=-1))
    token_B = jnp.where(forced < 0, token_B, forced).astype(jnp.int32)
    logp_MBV = jax.nn.log_softmax(logits_MBV)
    best_logp_MBC, best_MBC = jax.lax.top_k(logp_MBV, min(CANDIDATES, logp_MBV.shape[-1]))
    targets_MB = jnp.broadcast_to(token_B, logp_MBV.shape[:-1])
    return Token(
        token_B=token_B,
        mask_B=jnp.ones_like(token_B, bool),
        logp_MB=logprobs.gather(logits_MBV, targets_MB),
        kl_B=kl.exact(logits_MBV[-1], logits_MBV[0]),
        best_MBC=best_MBC,
        best_logp_MBC=best_logp_MBC,
    )
