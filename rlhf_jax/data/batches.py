"""Rows of text -> padded arrays of ids -> shuffled batches, with a position that can be saved.

N counts rows. Prompts are padded on the left and responses on the right, so that they meet where generation starts.
A response is its text, then EOS. Masks are True on all but padding.
"""

import contextlib
import functools
import hashlib
import sys
from collections.abc import Iterator

import numpy as np

from rlhf_jax.data import tldr
from rlhf_jax.errors import InputError
from rlhf_jax.text import Tokenizer

Arrays = dict[str, np.ndarray]
Counts = dict[str, int]

CHUNK = 1_000  # texts tokenized at once: fast, and never the ids of a whole data set as Python objects


def encode_prompts(
    rows: list[dict], tokenizer: Tokenizer, *, prompt_length: int, source: str = "data.prompts"
) -> tuple[Arrays, Counts]:
    """Each row's `prompt`: (prompt_NP, prompt_mask_NP, index_N) and the counts (rows, cut_prompts).

    index_N is the row's place in `rows`, from 0. A prompt that is too long is cut as `tldr.fit` says. An InputError
    starts with `source` and the row, from 1.
    """
    if not rows:
        raise InputError(f"{source}: expected at least one row, got none")
    prompts = [row["prompt"] for row in rows]
    prompt_NP = np.full((len(rows), prompt_length), tokenizer.pad_id, np.int32)
    cut_prompts = 0
    for i, ids in enumerate(_encode(prompts, tokenizer, rows, source, "prompt")):
        if len(ids) > prompt_length:
            with _naming(rows, i, source, "prompt"):
                ids, _ = tldr.fit(prompts[i], tokenizer, prompt_length)
            cut_prompts += 1
        prompt_NP[i, prompt_length - len(ids) :] = ids
    arrays = {
        "prompt_NP": prompt_NP,
        "prompt_mask_NP": prompt_NP != tokenizer.pad_id,
        "index_N": np.arange(len(rows), dtype=np.int32),
    }
    return arrays, {"rows": len(rows), "cut_prompts": cut_prompts}


def encode_sft(
    rows: list[dict], tokenizer: Tokenizer, *, prompt_length: int, response_length: int, source: str = "data.sft"
) -> tuple[Arrays, Counts]:
    """`encode_prompts`, and each row's `label`: (response_NR, response_mask_NR) and the count skipped_labels.

    A row is skipped if its label is too long: cut, it would teach a summary that does not end.
    """
    return _encode_answered(rows, {"label": "response"}, tokenizer, prompt_length, response_length, source)


def encode_pairs(
    rows: list[dict],
    tokenizer: Tokenizer,
    *,
    prompt_length: int,
    response_length: int,
    source: str = "data.preferences",
) -> tuple[Arrays, Counts]:
    """As `encode_sft`, with two responses: (chosen_NR, chosen_mask_NR) and (rejected_NR, rejected_mask_NR).

    A row is skipped if either is too long.
    """
    responses = {"chosen": "chosen", "rejected": "rejected"}
    return _encode_answered(rows, responses, tokenizer, prompt_length, response_length, source)


def iterate(
    arrays: Arrays, *, batch: int, seed: int, shuffle: bool = True, epochs: int | None = None
) -> "grain.DatasetIterator[Arrays]":  # noqa: F821
    """Batches of rows, `prompt_NP` as `prompt_BP` and so on; without end if `epochs` is None.

    Each epoch has an order of its own, drawn from `seed`, and drops the rows left over by its last batch. `get_state()`
    is the position; `set_state()` on another iterator over the same arrays goes on from there.
    """
    import grain  # half a second

    rows = len(arrays["index_N"])
    if not 0 < batch <= rows:
        raise InputError(f"batch: expected 1 to {rows}, the number of rows, got {batch}")
    steps = rows // batch

    @functools.lru_cache(maxsize=1)
    def order(epoch):  # by NumPy: Grain's shuffle takes up to milliseconds a row
        return np.random.default_rng((seed, epoch)).permutation(rows) if shuffle else np.arange(rows)

    def at(step):
        epoch, i = divmod(step, steps)
        return take(arrays, order(epoch)[i * batch : (i + 1) * batch])

    batches = grain.MapDataset.range(sys.maxsize if epochs is None else epochs * steps).map(at)
    no_threads = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # nothing is read, so nothing to read ahead
    return iter(batches.to_iter_dataset(no_threads))


def split(rows: list[dict], fraction: float, seed: int, column: str = "prompt") -> tuple[list[dict], list[dict]]:
    """(train, held out), with about `fraction` of the prompts (or what else `column` holds) held out.

    A prompt's side depends on nothing but itself and the seed: equal prompts are on the same side, also in two files.
    """
    train, held_out = [], []
    for row in rows:
        digest = hashlib.sha256(f"{seed} {row[column]}".encode()).digest()
        (held_out if int.from_bytes(digest[:8]) < fraction * 2**64 else train).append(row)
    if not train or not held_out:
        raise InputError(f"{fraction} of {len(rows)} rows held out: expected at least one row on each side")
    return train, held_out


def _encode_answered(
    rows: list[dict],
    responses: dict[str, str],
    tokenizer: Tokenizer,
    prompt_length: int,
    response_length: int,
    source: str,
) -> tuple[Arrays, Counts]:
    """`encode_prompts` and the columns that `responses` gives a name to; only the rows in which all of these fit."""
    arrays, counts = encode_prompts(rows, tokenizer, prompt_length=prompt_length, source=source)
    fits_N = np.ones(len(rows), bool)
    for column, name in responses.items():
        texts = [tldr.completion(row[column]) for row in rows]
        response_NR = np.full((len(rows), response_length), tokenizer.pad_id, np.int32)
        for i, ids in enumerate(_encode(texts, tokenizer, rows, source, column)):
            if len(ids) < response_length:
                response_NR[i, : len(ids) + 1] = [*ids, tokenizer.eos_id]
            else:
                fits_N[i] = False
        arrays |= {f"{name}_NR": response_NR, f"{name}_mask_NR": response_NR != tokenizer.pad_id}
    if not fits_N.any():
        columns = " and ".join(responses)
        raise InputError(f"{source}: expected {columns} of less than {response_length} tokens, but no row has that")
    arrays = {name: array[fits_N] for name, array in arrays.items()}
    return arrays, counts | {"skipped_labels": int(np.sum(~fits_N))}


def _encode(texts: list[str], tokenizer: Tokenizer, rows: list[dict], source: str, column: str) -> Iterator[list[int]]:
    for start in range(0, len(texts), CHUNK):
        chunk = texts[start : start + CHUNK]
        try:
            yield from tokenizer.encode_batch(chunk)
        except InputError:
            for i, text in enumerate(chunk, start):  # one by one, to name the row
                with _naming(rows, i, source, column):
                    tokenizer.encode(text)
            raise


@contextlib.contextmanager
def _naming(rows: list[dict], i: int, source: str, column: str) -> Iterator[None]:
    """Names the row in an InputError: by file and line where it was read from one (data/files.py), else by number."""
    try:
        yield
    except InputError as error:
        where = getattr(rows[i], "where", f"row {i + 1}")
        raise InputError(f"{source} {where}: {column}: {error}") from None


def take(arrays: Arrays, index_B: np.ndarray) -> Arrays:
    """The rows `index_B`; the first axis of each name becomes B: `prompt_NP` as `prompt_BP`."""
    batch = {}
    for name, array in arrays.items():
        noun, _, axes = name.rpartition("_")
        batch[f"{noun}_B{axes[1:]}"] = array[index_B]
    return batch
