"""Rows of text -> padded arrays of ids -> the shuffled batch of any step.

N counts rows. Prompts are padded on the left and responses on the right, so that they meet where generation starts.
A response is its text, then EOS. Masks are True on all but padding.
"""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from rlhf_jax.data import chats, tldr
from rlhf_jax.errors import InputError
from rlhf_jax.text import Tokenizer, chat
from rlhf_jax.text import files as text_files

Arrays = dict[str, np.ndarray]
Counts = dict[str, int]
Bad = dict[int, str]  # why a row, by its place, cannot be encoded

# What happens to a prompt that is too long. left: its first tokens are dropped; right: its last tokens are dropped;
# newline: the post of a TL;DR query is cut (tldr.fit), another prompt is an error; skip: its row is left out.
CUTS = ("left", "right", "newline", "skip", "error")

PERCENT = 95  # of the prompts: a prompt_length that holds these is suggested where more than half are too long
CHUNK = 1_000  # texts tokenized at once: fast, and never the ids of a whole data set as Python objects


def encode_prompts(
    rows: list[dict],
    tokenizer: Tokenizer,
    *,
    prompt_length: int,
    cut: str = "newline",
    source: str = "data.prompts",
    skip_bad: bool = False,
    notes: list[str] | None = None,
) -> tuple[Arrays, Counts]:
    """Each row's `prompt`: (prompt_NP, prompt_mask_NP, index_N) and the counts (rows, cut_prompts, skipped_prompts).

    `cut`, one of CUTS, decides what happens to a prompt of more than `prompt_length` tokens. index_N is the row's place
    in `rows`, from 0. An InputError starts with `source` and the row, from 1. With `skip_bad`, a row that cannot be
    encoded is left out instead, and the list `notes` says how many were, and why the first. It also says what
    prompt_length would do where more than half of the prompts are too long.
    """
    bad: Bad | None = {} if skip_bad else None
    found = _prompts(rows, tokenizer, prompt_length, cut, source, bad, notes)
    note(bad, source, notes)
    return found


def encode_sft(
    rows: list[dict],
    tokenizer: Tokenizer,
    *,
    prompt_length: int,
    response_length: int,
    cut: str = "newline",
    source: str = "data.sft",
    skip_bad: bool = False,
    notes: list[str] | None = None,
) -> tuple[Arrays, Counts]:
    """`encode_prompts`, and each row's `label`: (response_NR, response_mask_NR) and the count skipped_labels.

    A row is skipped if its label is too long: cut, it would teach a summary that does not end. skipped_labels counts
    these among the rows whose prompt is kept.
    """
    lengths = prompt_length, response_length
    return _encode_answered(rows, {"label": "response"}, tokenizer, lengths, cut, source, skip_bad, notes)


def encode_pairs(
    rows: list[dict],
    tokenizer: Tokenizer,
    *,
    prompt_length: int,
    response_length: int,
    cut: str = "newline",
    source: str = "data.preferences",
    skip_bad: bool = False,
    notes: list[str] | None = None,
) -> tuple[Arrays, Counts]:
    """As `encode_sft`, with two responses: (chosen_NR, chosen_mask_NR) and (rejected_NR, rejected_mask_NR).

    A row is skipped if either is too long, or if both are the same: the count skipped_identical_pairs.
    """
    responses, lengths = {"chosen": "chosen", "rejected": "rejected"}, (prompt_length, response_length)
    arrays, counts = _encode_answered(rows, responses, tokenizer, lengths, cut, source, skip_bad, notes)
    differ_N = different(arrays["chosen_NR"], arrays["rejected_NR"], source)
    arrays = {name: array[differ_N] for name, array in arrays.items()}
    return arrays, counts | {"skipped_identical_pairs": int(np.sum(~differ_N))}


def different(chosen_NR: np.ndarray, rejected_NR: np.ndarray, source: str) -> np.ndarray:
    """[N] bool: which pairs teach something, as their ids differ. InputError, beginning with `source`, if none does."""
    differ_N = (chosen_NR != rejected_NR).any(axis=1)
    if not differ_N.any():
        raise InputError(f"{source}: expected chosen and rejected that differ, got the same tokens in all rows")
    return differ_N


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
        kinds = len({row[column] for row in rows})
        got = f"got {len(rows)} rows with {kinds} different {column}{'s' * (kinds > 1)}"
        empty = "none is left to train on" if held_out else "none is held out"
        raise InputError(f"expected rows to train on and rows to hold out ({fraction} of all), {got}: {empty}")
    return train, held_out


def encode(
    rows: list[dict],
    column: str,
    tokenizer: Tokenizer,
    source: str,
    bad: Bad | None = None,
) -> Iterator[list[int] | None]:
    """The ids of each row's text in the column.

    A text that cannot be encoded is an InputError that names the row. With a dict `bad` its ids are None instead, and
    the dict gets the message.
    """
    yield from _encoded(rows, column, source, bad, lambda row: row[column], tokenizer.encode_batch)


def _encoded(
    rows: list[dict],
    column: str,
    source: str,
    bad: Bad | None,
    read: Callable[[dict], Any],
    encode_batch: Callable[[list], list[list[int]]],
) -> Iterator[list[int] | None]:
    """encode_batch([read(row), ...]) of all rows, as in `encode`."""
    for start in range(0, len(rows), CHUNK):
        values = [read(row) for row in rows[start : start + CHUNK]]
        chunk: list = values
        try:
            chunk = encode_batch(values)
        except InputError:  # one by one, to name the row
            chunk = [None] * len(values)
            for i, value in enumerate(values, start):
                try:
                    with _naming(rows, i, source, column):
                        (chunk[i - start],) = encode_batch([value])
                except InputError as error:
                    if bad is None:
                        raise
                    bad.setdefault(i, str(error))
        yield from chunk


def is_chat(row: dict, tokenizer: Tokenizer) -> bool:
    """Whether the row is read through the chat template."""
    return chats.KEY in row and tokenizer.template != text_files.NONE


def prompt_ids(
    rows: list[dict], tokenizer: Tokenizer, source: str, bad: Bad | None = None
) -> Iterator[list[int] | None]:
    """The ids of each row's prompt, as `encode` yields them."""
    if not is_chat(rows[0], tokenizer):
        found = encode(rows, "prompt", tokenizer, source, bad)
        return (ids if ids is None else [*tokenizer.begin, *ids] for ids in found)

    def encode_batch(conversations):
        return [chat.prompt(tokenizer, messages) for messages in conversations]

    return _encoded(rows, "prompt", source, bad, lambda row: row[chats.KEY], encode_batch)


def answer_ids(
    rows: list[dict], column: str, tokenizer: Tokenizer, source: str, bad: Bad | None = None
) -> Iterator[list[int] | None]:
    """The ids of each row's answer in the column, EOS included, as `encode` yields them."""
    if is_chat(rows[0], tokenizer):

        def encode_batch(pairs):
            return [chat.answer(tokenizer, messages, answer) for messages, answer in pairs]

        return _encoded(rows, column, source, bad, lambda row: (row[chats.KEY], row[column]), encode_batch)

    def with_eos(texts):
        return [[*ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(texts)]

    return _encoded(rows, column, source, bad, lambda row: tldr.completion(row[column], tokenizer.space), with_eos)


def note(bad: Bad | None, source: str, notes: list[str] | None) -> None:
    """Adds to the notes how many rows could not be encoded, and why the first."""
    if bad and notes is not None:
        first = bad[min(bad)].removeprefix(f"{source}: ")
        notes.append(f"{source}: {len(bad)} rows skipped; the first: {first}")


def _prompts(
    rows: list[dict],
    tokenizer: Tokenizer,
    prompt_length: int,
    cut: str,
    source: str,
    bad: Bad | None,
    notes: list[str] | None,
) -> tuple[Arrays, Counts]:
    """As `encode_prompts`; `bad` as in `encode`."""
    if cut not in CUTS:
        raise InputError(f"cut: expected one of {', '.join(CUTS)}; got {cut!r}")
    if not rows:
        raise InputError(f"{source}: expected at least one row, got none")
    prompt_NP = np.full((len(rows), prompt_length), tokenizer.pad_id, np.int32)
    kept_N = np.ones(len(rows), bool)
    lengths, counts = [], {"rows": len(rows), "cut_prompts": 0, "skipped_prompts": 0}
    for i, ids in enumerate(prompt_ids(rows, tokenizer, source, bad)):
        if ids is None:
            kept_N[i] = False
            continue
        lengths.append(len(ids))
        if len(ids) > prompt_length:
            if cut == "skip":
                kept_N[i] = False
                counts["skipped_prompts"] += 1
                continue
            with _naming(rows, i, source, "prompt"):
                ids = _shorten(ids, rows[i], tokenizer, prompt_length, cut)
            counts["cut_prompts"] += 1
        prompt_NP[i, prompt_length - len(ids) :] = ids
    if bad and not lengths:
        raise InputError(f"{bad[0]}; and no other of the {len(rows)} prompts can be encoded")
    if not kept_N.any():
        raise InputError(f"{source}: expected prompts of at most {prompt_length} tokens, but no row has that")
    too_long = sum(length > prompt_length for length in lengths)
    if notes is not None and 2 * too_long > len(lengths):
        enough = sorted(lengths)[-(-PERCENT * len(lengths) // 100) - 1]
        notes.append(
            f"{source}: {too_long} of {len(lengths)} prompts have more than {prompt_length} tokens; "
            f"a prompt_length of {enough} would hold {PERCENT}% of them"
        )
    prompt_NP = prompt_NP[kept_N]
    arrays = {
        "prompt_NP": prompt_NP,
        "prompt_mask_NP": prompt_NP != tokenizer.pad_id,
        "index_N": np.flatnonzero(kept_N).astype(np.int32),
    }
    return arrays, counts


def _encode_answered(
    rows: list[dict],
    responses: dict[str, str],
    tokenizer: Tokenizer,
    lengths: tuple[int, int],
    cut: str,
    source: str,
    skip_bad: bool,
    notes: list[str] | None,
) -> tuple[Arrays, Counts]:
    """`encode_prompts` and the columns that `responses` gives a name to; only the rows in which all of these fit."""
    bad: Bad | None = {} if skip_bad else None
    prompt_length, response_length = lengths
    arrays, counts = _prompts(rows, tokenizer, prompt_length, cut, source, bad, notes)
    answers: Arrays = {}
    fits_N = np.ones(len(rows), bool)
    for column, name in responses.items():
        response_NR = np.full((len(rows), response_length), tokenizer.pad_id, np.int32)
        for i, ids in enumerate(answer_ids(rows, column, tokenizer, source, bad)):
            if ids is not None and len(ids) <= response_length:
                response_NR[i, : len(ids)] = ids
            else:
                fits_N[i] = False
        answers |= {f"{name}_NR": response_NR, f"{name}_mask_NR": response_NR != tokenizer.pad_id}
    note(bad, source, notes)
    index_N = arrays["index_N"]
    fits_N = fits_N[index_N]
    if not fits_N.any():
        columns, row = " and ".join(responses), "row whose prompt fits" if counts["skipped_prompts"] else "row"
        why = f"; the first of {len(bad)} that cannot be encoded: {bad[min(bad)]}" if bad else ""
        expected = f"expected {columns} of less than {response_length} tokens, but no {row} has that"
        raise InputError(f"{source}: {expected}{why}")
    arrays = {name: array[fits_N] for name, array in arrays.items()}
    arrays |= {name: array[arrays["index_N"]] for name, array in answers.items()}
    too_long = [i for i in index_N[~fits_N] if i not in (bad or {})]
    return arrays, counts | {"skipped_labels": len(too_long)}


def _shorten(ids: list[int], row: dict, tokenizer: Tokenizer, limit: int, cut: str) -> list[int]:
    """The ids of the row's prompt, more than `limit`, cut to at most that. InputError if `cut` does not allow it."""
    match cut:
        case "left":
            begin = [] if is_chat(row, tokenizer) else tokenizer.begin
            return [*begin, *ids[len(ids) - limit + len(begin) :]]
        case "right":
            return ids[:limit]
        case "newline" if not is_chat(row, tokenizer):
            return [*tokenizer.begin, *tldr.fit(row["prompt"], tokenizer, limit - len(tokenizer.begin))[0]]
    whole = "; a conversation has no post to cut (data.cut)" if cut == "newline" else ""
    raise InputError(f"expected at most {limit} tokens, got {len(ids)}{whole}")


@contextlib.contextmanager
def _naming(rows: list[dict], i: int, source: str, column: str) -> Iterator[None]:
    """Names the row in an InputError: by file and line where it was read from one (data/files.py), else by number."""
    try:
        yield
    except InputError as error:
        where = getattr(rows[i], "where", f"row {i + 1}")
        raise InputError(f"{source}: {where}: {column}: {error}") from None


def take(arrays: Arrays, index_B: np.ndarray) -> Arrays:
    """The rows `index_B`; the first axis of each name becomes B: `prompt_NP` as `prompt_BP`."""
    batch = {}
    for name, array in arrays.items():
        noun, _, axes = name.rpartition("_")
        batch[f"{noun}_B{axes[1:]}"] = array[index_B]
    return batch
