"""Rows of text -> padded arrays of ids -> the shuffled batch of any step.

N counts rows. Prompts are padded on the left and responses on the right, so that they meet where generation starts.
A response is its text, then EOS. Masks are True on all but padding.
"""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator

import numpy as np

from rlhf_jax.data import tldr
from rlhf_jax.errors import InputError
from rlhf_jax.text import Tokenizer

Arrays = dict[str, np.ndarray]
Counts = dict[str, int]

# What happens to a prompt that is too long. left: its first tokens are dropped; right: its last tokens are dropped;
# newline: the post of a TL;DR query is cut (tldr.fit), another prompt is an error; skip: its row is left out.
CUTS = ("left", "right", "newline", "skip", "error")

CHUNK = 1_000  # texts tokenized at once: fast, and never the ids of a whole data set as Python objects


def encode_prompts(
    rows: list[dict],
    tokenizer: Tokenizer,
    *,
    prompt_length: int,
    cut: str = "newline",
    source: str = "data.prompts",
) -> tuple[Arrays, Counts]:
    """Each row's `prompt`: (prompt_NP, prompt_mask_NP, index_N) and the counts (rows, cut_prompts, skipped_prompts).

    `cut`, one of CUTS, decides what happens to a prompt of more than `prompt_length` tokens. index_N is the row's place
    in `rows`, from 0. An InputError starts with `source` and the row, from 1.
    """
    if cut not in CUTS:
        raise InputError(f"cut: expected one of {', '.join(CUTS)}; got {cut!r}")
    if not rows:
        raise InputError(f"{source}: expected at least one row, got none")
    prompts = [row["prompt"] for row in rows]
    prompt_NP = np.full((len(rows), prompt_length), tokenizer.pad_id, np.int32)
    kept_N = np.ones(len(rows), bool)
    cut_prompts = 0
    for i, ids in enumerate(_encode(prompts, tokenizer, rows, source, "prompt")):
        if len(ids) > prompt_length:
            if cut == "skip":
                kept_N[i] = False
                continue
            with _naming(rows, i, source, "prompt"):
                ids = _shorten(ids, prompts[i], tokenizer, prompt_length, cut)
            cut_prompts += 1
        prompt_NP[i, prompt_length - len(ids) :] = ids
    if not kept_N.any():
        raise InputError(f"{source}: expected prompts of at most {prompt_length} tokens, but no row has that")
    prompt_NP = prompt_NP[kept_N]
    arrays = {
        "prompt_NP": prompt_NP,
        "prompt_mask_NP": prompt_NP != tokenizer.pad_id,
        "index_N": np.flatnonzero(kept_N).astype(np.int32),
    }
    return arrays, {"rows": len(rows), "cut_prompts": cut_prompts, "skipped_prompts": int(np.sum(~kept_N))}


def encode_sft(
    rows: list[dict],
    tokenizer: Tokenizer,
    *,
    prompt_length: int,
    response_length: int,
    cut: str = "newline",
    source: str = "data.sft",
) -> tuple[Arrays, Counts]:
    """`encode_prompts`, and each row's `label`: (response_NR, response_mask_NR) and the count skipped_labels.

    A row is skipped if its label is too long: cut, it would teach a summary that does not end. skipped_labels counts
    these among the rows whose prompt is kept.
    """
    return _encode_answered(rows, {"label": "response"}, tokenizer, prompt_length, response_length, cut, source)


def encode_pairs(
    rows: list[dict],
    tokenizer: Tokenizer,
    *,
    prompt_length: int,
    response_length: int,
    cut: str = "newline",
    source: str = "data.preferences",
) -> tuple[Arrays, Counts]:
    """As `encode_sft`, with two responses: (chosen_NR, chosen_mask_NR) and (rejected_NR, rejected_mask_NR).

    A row is skipped if either is too long.
    """
    responses = {"chosen": "chosen", "rejected": "rejected"}
    return _encode_answered(rows, responses, tokenizer, prompt_length, response_length, cut, source)


def batch_at(arrays: Arrays, *, batch: int, seed: int) -> Callable[[int], Arrays]:
    """The batch of each step, from 0, as a function of nothing but the seed and the step; `take` names its arrays.

    Each epoch has an order of its own, drawn from `seed`, and drops the rows left over by its last batch.
    """
    rows = len(arrays["index_N"])
    if not 0 < batch <= rows:
        raise InputError(f"batch: expected 1 to {rows}, the number of rows, got {batch}")
    steps = rows // batch  # of an epoch

    @functools.lru_cache(maxsize=1)
    def order(epoch):
        return np.random.default_rng((seed, epoch)).permutation(rows)

    def at(step):
        epoch, i = divmod(step, steps)
        return take(arrays, order(epoch)[i * batch : (i + 1) * batch])

    return at


def split(rows: list[dict], fraction: float, seed: int, column: str = "prompt") -> tuple[list[dict], list[dict]]:
    """(train, held out), with about `fraction` of the prompts (or what else `column` holds) held out.

    A prompt's side depends on nothing but itself and the seed: equal prompts are on the same side, also in two files.
    """
    train: list[dict] = []
    held_out: list[dict] = []
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
    cut: str,
    source: str,
) -> tuple[Arrays, Counts]:
    """`encode_prompts` and the columns that `responses` gives a name to; only the rows in which all of these fit."""
    arrays, counts = encode_prompts(rows, tokenizer, prompt_length=prompt_length, cut=cut, source=source)
    answers: Arrays = {}
    fits_N = np.ones(len(rows), bool)
    for column, name in responses.items():
        texts = [tldr.completion(row[column]) for row in rows]
        response_NR = np.full((len(rows), response_length), tokenizer.pad_id, np.int32)
        for i, ids in enumerate(_encode(texts, tokenizer, rows, source, column)):
            if len(ids) < response_length:
                response_NR[i, : len(ids) + 1] = [*ids, tokenizer.eos_id]
            else:
                fits_N[i] = False
        answers |= {f"{name}_NR": response_NR, f"{name}_mask_NR": response_NR != tokenizer.pad_id}
    fits_N = fits_N[arrays["index_N"]]
    if not fits_N.any():
        columns, row = " and ".join(responses), "row whose prompt fits" if counts["skipped_prompts"] else "row"
        raise InputError(f"{source}: expected {columns} of less than {response_length} tokens, but no {row} has that")
    arrays = {name: array[fits_N] for name, array in arrays.items()}
    arrays |= {name: array[arrays["index_N"]] for name, array in answers.items()}
    return arrays, counts | {"skipped_labels": int(np.sum(~fits_N))}


def _shorten(ids: list[int], text: str, tokenizer: Tokenizer, limit: int, cut: str) -> list[int]:
    """The ids of `text`, more than `limit`, cut to at most that. InputError if `cut` does not allow it."""
    match cut:
        case "left":
            return ids[len(ids) - limit :]
        case "right":
            return ids[:limit]
        case "newline":
            return tldr.fit(text, tokenizer, limit)[0]
    raise InputError(f"expected at most {limit} tokens, got {len(ids)}")


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
