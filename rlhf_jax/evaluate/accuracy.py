"""How often a reward model agrees with the label."""

from rlhf_jax.evaluate.win_rate import win_rate


def accuracy(chosen_N, rejected_N):
    """Share of N preference pairs whose chosen completion scores higher: (rate, (lo, hi)), as in `win_rate`.

    Ties count one half, so a reward model that scores everything alike gets 0.5, as does a coin.
    """
    return win_rate(chosen_N, rejected_N)
