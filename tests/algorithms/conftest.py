"""A rollout by hand."""

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.rollout import Apply, Rollout


@pytest.fixture(scope="session")
def drawn(bigram):
    """Eight completions of 1 to 4 tokens on 7 ids, as the first table samples them: (table, other, Apply, Rollout)."""
    B, R = 8, 4
    keys = jax.random.split(jax.random.key(0), 4)
    table, other = jax.random.normal(keys[0], (2, 7, 7))
    mask_BR = jnp.arange(R) < jnp.array([4, 1, 3, 2, 4, 2, 1, 3])[:, None]
    response_BR = jnp.where(mask_BR, jax.random.randint(keys[1], (B, R), 1, 7), 0)
    rollout = Rollout(
        prompt_BP=jnp.full((B, 1), 2).at[4:].set(3),
        prompt_mask_BP=jnp.ones((B, 1), bool),
        response_BR=response_BR,
        mask_BR=mask_BR,
        eos_B=jnp.array([0, 1, 1, 1, 0, 1, 1, 1], bool),
        logp_BR=jnp.zeros((B, R)),
        logp_ref_BR=jnp.zeros((B, R)),
        kl_exact_BR=jnp.zeros((B, R)),
        entropy_BR=jnp.zeros((B, R)),
        score_B=jax.random.normal(keys[2], (B,)),
    )
    inputs = (rollout.tokens_BT, rollout.attend_BT)
    hidden = [bigram.hidden(each, *inputs, R) for each in (table, other)]
    ref_BR, exact_BR, entropy_BR = bigram.compare(table, hidden[0], other, hidden[1], response_BR, temperature=0.7)
    found = {
        "logp_BR": bigram.logprobs(table, *inputs, R, temperature=0.7),
        "logp_ref_BR": ref_BR,
        "kl_exact_BR": exact_BR,
        "entropy_BR": entropy_BR,
    }
    rollout = rollout.replace(**{key: jnp.where(mask_BR, array, 0) for key, array in found.items()})
    return table, other, Apply(bigram, None), rollout
