import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.checkpoint import Checkpoints
from rlhf_jax.train_state import TrainState

POSITION = {"next_index": 7, "epoch": {"seed": 3}}
# Not a number, the zeros, the smallest and the largest: what a cast or a text would lose.
ODD = np.array([0x7FC00001, 0x80000000, 0x00000000, 0x00000001, 0x7F7FFFFF, 0xFF800000], np.uint32).view(np.float32)


def state(seed=0):
    """Parameters of two types in a tree two deep; value and reward are None, as in a stage that does not have them."""
    key = jax.random.key(seed)
    policy = {"wte": {"embedding": jax.random.normal(key, (5, 3))}, "odd": jnp.array(ODD) * (1 if seed == 0 else 0)}
    optimizer = {"policy": {"count": jnp.int32(seed), "mu": jnp.full((2, 2), 1 / 3, jnp.bfloat16)}}
    return TrainState.create(
        jax.random.fold_in(key, 1), policy=policy, reference={"x": jnp.ones(4)}, optimizer=optimizer
    ).replace(step=jnp.int32(11), kl_coef=jnp.float32(0.1))


def assert_same_bits(ours, theirs):
    """Equal trees, types, placements and bits: typed keys by their data."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)
        a, b = (
            np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x) for x in (a, b)
        )
        assert a.tobytes() == b.tobytes()


def test_what_is_restored_is_what_was_saved_bit_for_bit(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest is None
        checkpoints.save(11, state(), POSITION)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == 11
        restored, position = checkpoints.restore(state(seed=1))
    assert_same_bits(restored, state())
    assert position == POSITION
    assert restored.value is None and restored.reward is None
    # the key is a key again
    assert jax.random.normal(restored.step_key) == jax.random.normal(state().step_key)


@pytest.mark.parametrize("field", ["policy", "reference"])
def test_one_field_alone(field, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(11, state(), POSITION)
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore_field(field, getattr(state(seed=1), field))
    assert_same_bits(restored, getattr(state(), field))


def test_the_newest_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in 3, 6, 9, 10:
            checkpoints.save(step, state().replace(step=jnp.int32(step)), {"next_index": step})
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [9, 10]
    with Checkpoints(tmp_path) as checkpoints:
        restored, position = checkpoints.restore(state())
    assert (checkpoints.latest, restored.step, position) == (10, 10, {"next_index": 10})


def test_a_state_can_be_donated_right_after_it_was_saved(tmp_path):
    """The next step overwrites its buffers while the write is still under way."""
    learn = jax.jit(lambda policy: jax.tree.map(lambda x: 2 * x + 1, policy), donate_argnums=0)
    policy = {str(i): numbers for i, numbers in enumerate(jax.random.normal(jax.random.key(0), (4, 1_000_000)))}
    learn(jax.tree.map(jnp.copy, policy))  # compiled, so that nothing holds up the one that counts
    as_saved = jax.tree.map(jnp.copy, policy)  # on the device: a NumPy view of a buffer would keep it from donation
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state().replace(policy=policy), POSITION)
        after = learn(policy)
    with Checkpoints(tmp_path) as checkpoints:
        assert_same_bits(checkpoints.restore_field("policy", after), as_saved)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_leaving_waits_for_the_writes_under_way(error, tmp_path):
    large = state().replace(policy={"x": jnp.ones(8_000_000)})
    try:
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, large, POSITION)
            if error:
                raise error
    except KeyboardInterrupt:
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
