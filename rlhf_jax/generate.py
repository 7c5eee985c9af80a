"""Sampling completions: read the prompts, then one decode step at a time, compiled as a loop or streamed.

Both loops run `start` and `advance`. Randomness belongs to a prompt's row: row b draws its token i with
fold_in(keys_B[b], i), whatever else is in the batch.
"""

import dataclasses

import flax
import jax
import jax.numpy as jnp

from rlhf_jax.ops import sampling


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How completions are drawn."""

    max_tokens: int  # R, EOS included
    eos_id: int
    pad_id: int
    temperature: float = 1.0  # 0: the most likely token
    top_k: int = 0  # 0: all. Evaluation and playground only
    top_p: float = 1.0  # 1: all. Evaluation and playground only


@flax.struct.dataclass
class State:
    """Everything the decode step needs. Columns < step of the `_BR` arrays are filled."""

    step: jax.Array  # () int32, response tokens drawn so far
    done_B: jax.Array  # the row has drawn EOS
    keys_B: jax.Array
    cache: object
    response_BR: jax.Array  # PAD after EOS
    mask_BR: jax.Array  # 1 up to and with EOS
    logp_BR: jax.Array  # of each token under the distribution it was drawn from; 0 after EOS
    hidden_BRD: jax.Array  # the state that each token was drawn from


def start(model, params, prompt_BP, prompt_mask_BP, keys_B, config):
    """Reads the prompts and draws the first token of each row."""
    B, P = prompt_BP.shape
    R = config.max_tokens
    hidden_BD, cache = model.prefill(params, prompt_BP, prompt_mask_BP, P + R)
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


def advance(model, params, state, config):
    """Reads the token drawn last and draws the next one of each row that has not ended."""
    token_B = jax.lax.dynamic_index_in_dim(state.response_BR, state.step - 1, axis=1, keepdims=False)
    hidden_BD, cache = model.decode(params, token_B, ~state.done_B, state.cache)
    return _draw(model, params, hidden_BD, state.replace(cache=cache), config)


def _draw(model, params, hidden_BD, state, config):
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(state.keys_B, state.step)

    def draw(key, logits_V):
        return sampling.draw(key, logits_V, temperature=config.temperature, k=config.top_k, p=config.top_p)

    token_B, logp_B = jax.vmap(draw)(keys_B, model.logits(params, hidden_BD))
    alive_B = ~state.done_B

    def write(array_BR, column_B):
        return jax.lax.dynamic_update_index_in_dim(array_BR, column_B, state.step, axis=1)

    return state.replace(
        step=state.step + 1,
        done_B=state.done_B | (token_B == config.eos_id),
        response_BR=write(state.response_BR, jnp.where(alive_B, token_B, config.pad_id)),
        mask_BR=write(state.mask_BR, alive_B),
        logp_BR=write(state.logp_BR, jnp.where(alive_B, logp_B, 0)),
        hidden_BRD=write(state.hidden_BRD, hidden_BD),
    )


def generate(model, params, prompt_BP, prompt_mask_BP, keys_B, config):
    """Completes every prompt: the final State. One while loop, which ends when every row has."""

    def unfinished(state):
        return (state.step < config.max_tokens) & ~jnp.all(state.done_B)

    state = start(model, params, prompt_BP, prompt_mask_BP, keys_B, config)
    return jax.lax.while_loop(unfinished, lambda state: advance(model, params, state, config), state)


def stream(model, params, prompt_BP, prompt_mask_BP, keys_B, config):
    """Yields the State after each token: the same steps as `generate`, driven from Python."""
    state = jax.jit(start, static_argnums=(0, 5))(model, params, prompt_BP, prompt_mask_BP, keys_B, config)
    step = jax.jit(advance, static_argnums=(0, 3), donate_argnums=())
    while True:
        yield state
        if int(state.step) == config.max_tokens or bool(jnp.all(state.done_B)):
            return
        state = step(model, params, state, config)
