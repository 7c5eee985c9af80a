import jax.numpy as jnp
import numpy as np

from rlhf_jax.ops import padding


def test_a_slice_has_rows_of_similar_length():
    # Lengths 3 1 2 4 for two slices, dealt out in turn: one gets rows of 1 and 2 tokens, the other of 3 and 4
    mask_BP = jnp.arange(4) >= 4 - jnp.array([3, 1, 2, 4])[:, None]
    np.testing.assert_array_equal(padding.alike(mask_BP, 2), [1, 0, 2, 3])
    np.testing.assert_array_equal(padding.alike(mask_BP, 1), [1, 2, 0, 3])


def test_padding_that_all_prompts_share_is_cut_off():
    """3, 5 or 7 of 7 columns stay (thirds, rounded up). The longest prompt decides."""
    for longest, width in {1: 3, 3: 3, 4: 5, 5: 5, 6: 7, 7: 7}.items():
        prompt_BP = jnp.arange(7) + jnp.array([[0], [10]])
        mask_BP = jnp.arange(7) >= 7 - jnp.array([[1], [longest]])
        columns, first, seen = padding.cut(
            lambda prompt, mask: (jnp.int32(prompt.shape[1]), prompt[:, -1], mask.sum(axis=1)), prompt_BP, mask_BP, 3
        )
        assert columns == width
        assert first.tolist() == [6, 16] and seen.tolist() == [1, longest]
