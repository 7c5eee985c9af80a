"""How often a reward model agrees with the label."""

from rlhf_jax.evaluate.win_rate import win_rate


def accuracy(chosen_N, rejected_N):
    """Share of N preference pairs whose chosen completion scores higher: (rate, (lo, hi)) as from `win_rate`.

    A tie counts one half, so a reward model with one score for everything gets 0.5, like a coin flip.
    """
    return win_rate(chosen_N, rejected_N)
