"""Scaled dot-product attention under a mask (Vaswani et al. 2017, eq. 1), with its own backward pass.

The backward pass recomputes the weights (Dao et al. 2022, arXiv 2205.14135, section 3.1), so nothing of size T x S is
kept between the two passes. Causal attention takes the queries in blocks and leaves out the keys after each block.
"""

import jax
import jax.numpy as jnp

BLOCKS, SMALLEST = 3, 32  # most blocks of causal queries, fewest queries in a block


def attend(q_BHTK, k_BASK, v_BASK, mask_BTS, *, causal=False):
    """softmax(q k' / sqrt(K)) v, [B, H, T, K], with weights only where mask_BTS is 1; softmax in float32 or wider.

    A divides H: head h of the queries reads head h // (H / A) of keys and values (Ainslie et al. 2023, arXiv
    2305.13245), which are not repeated: the queries of a group are rows of one product.

    causal=True promises that T = S and that the mask hides every key after its query: most of those pairs are then
    not computed. A query that sees no key gets an arbitrary finite result.
    """
    q_BHTK = q_BHTK * q_BHTK.shape[-1] ** -0.5
    T = q_BHTK.shape[2]
    if not causal:
        return _grouped(q_BHTK, k_BASK, v_BASK, mask_BTS)
    size = max(-(-T // BLOCKS), SMALLEST)
    blocks = []
    for start in range(0, T, size):
        end = min(start + size, T)
        keys, values = k_BASK[:, :, :end], v_BASK[:, :, :end]
        blocks.append(_grouped(q_BHTK[:, :, start:end], keys, values, mask_BTS[:, start:end, :end]))
    return jnp.concatenate(blocks, axis=2)


def _grouped(q_BHTK, k_BASK, v_BASK, mask_BTS):
    """_attend of A heads: the T queries of each head of a group follow one another, T H/A rows in all."""
    B, H, T, K = q_BHTK.shape
    group = H // k_BASK.shape[1]
    if group == 1:
        return _attend(q_BHTK, k_BASK, v_BASK, mask_BTS)
    out = _attend(q_BHTK.reshape(B, -1, group * T, K), k_BASK, v_BASK, jnp.tile(mask_BTS, (1, group, 1)))
    return out.reshape(B, H, T, K)


def fused(q_BHTK, k_BASK, v_BASK, mask_BTS):
    """`attend` as one cuDNN kernel, which never stores the weights. NVIDIA GPUs and half precision only."""
    T, S = mask_BTS.shape[1:]
    # With a mask, the kernel has gradients for even lengths only.
    q_BTHK, k_BSHK, v_BSHK = (
        jnp.pad(jnp.moveaxis(x_BHTK, 1, 2), ((0, 0), (0, x_BHTK.shape[2] % 2), (0, 0), (0, 0)))
        for x_BHTK in (q_BHTK, k_BASK, v_BASK)
    )
    mask_B1TS = jnp.pad(mask_BTS, ((0, 0), (0, T % 2), (0, S % 2)))[:, None]
    out_BTHK = jax.nn.dot_product_attention(q_BTHK, k_BSHK, v_BSHK, mask=mask_B1TS, implementation="cudnn")
    return jnp.moveaxis(out_BTHK[:, :T], 1, 2)


@jax.custom_vjp
def _attend(q_BHTK, k_BHSK, v_BHSK, mask_BTS):
    return _forward(q_BHTK, k_BHSK, v_BHSK, mask_BTS)[0]


def _forward(q_BHTK, k_BHSK, v_BHSK, mask_BTS):
    scores_BHTS = _scores(q_BHTK, k_BHSK, mask_BTS)
    top_BHT1 = jnp.max(scores_BHTS, axis=-1, keepdims=True)
    weights_BHTS = jnp.exp(scores_BHTS - top_BHT1)
    total_BHT1 = jnp.sum(weights_BHTS, axis=-1, keepdims=True)
    mixed_BHTK = jnp.einsum("bhts,bhsk->bhtk", weights_BHTS.astype(v_BHSK.dtype), v_BHSK)
    out_BHTK = (mixed_BHTK / total_BHT1).astype(q_BHTK.dtype)
    return out_BHTK, (q_BHTK, k_BHSK, v_BHSK, mask_BTS, top_BHT1, total_BHT1, out_BHTK)


def _backward(kept, grad_BHTK):
    """With P the weights and O the result: dV = P' dO, dS = P * (dO V' - sum(dO * O)), dQ = dS K, dK = dS' Q."""
    q_BHTK, k_BHSK, v_BHSK, mask_BTS, top_BHT1, total_BHT1, out_BHTK = kept
    # These weights sum to `total`, not 1: dO is divided by it instead.
    weights_BHTS = jnp.exp(_scores(q_BHTK, k_BHSK, mask_BTS) - top_BHT1)
    scaled_BHTK = (grad_BHTK / total_BHT1).astype(q_BHTK.dtype)
    inner_BHT1 = jnp.sum((scaled_BHTK * out_BHTK).astype(total_BHT1.dtype), axis=-1, keepdims=True)
    grad_weights_BHTS = _product(scaled_BHTK, v_BHSK)
    grad_scores_BHTS = (weights_BHTS * (grad_weights_BHTS - inner_BHT1)).astype(q_BHTK.dtype)
    return (
        jnp.einsum("bhts,bhsk->bhtk", grad_scores_BHTS, k_BHSK),
        jnp.einsum("bhts,bhtk->bhsk", grad_scores_BHTS, q_BHTK),
        jnp.einsum("bhts,bhtk->bhsk", weights_BHTS.astype(q_BHTK.dtype), scaled_BHTK),
        None,
    )


def _scores(q_BHTK, k_BHSK, mask_BTS):
    scores_BHTS = _product(q_BHTK, k_BHSK)
    # A finite floor, not -inf: a padding query attends to nothing and must not become NaN.
    return jnp.where(mask_BTS[:, None], scores_BHTS, jnp.finfo(scores_BHTS.dtype).min)


def _product(x_BHTK, y_BHSK):
    wide = jnp.promote_types(x_BHTK.dtype, jnp.float32)
    return jnp.einsum("bhtk,bhsk->bhts", x_BHTK, y_BHSK, preferred_element_type=wide)


_attend.defvjp(_forward, _backward)
