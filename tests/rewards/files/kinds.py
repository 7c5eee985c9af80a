"""Functions that return all kinds of things."""

import numpy as np


def ints(texts):
    return [len(text) for text in texts]


def bools(texts):
    return [len(text) > 3 for text in texts]


def gen(texts):
    return (float(len(text)) for text in texts)


def col(texts):
    return np.array([[len(text)] for text in texts])


def strs(texts):
    return [str(len(text)) for text in texts]


def none(texts):
    return None


def nones(texts):
    return [None for _ in texts]


def big(texts):
    return [1e39 for _ in texts]


def same(texts):
    return [1.0 for _ in texts]


def mutate(texts):
    count = len(texts)
    texts.clear()
    return [0.0] * count


def exits(texts):
    raise SystemExit(3)
