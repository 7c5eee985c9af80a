"""Conversations as ids: a model's chat template writes the messages as one text, in Jinja as transformers runs it.

A message is {"role": text, "content": text}, with any other fields that the template reads. The template runs in
jinja2's immutable sandbox, without a clock: `strftime_now` is not defined, as a run must not depend on the day.
"""

import functools
import json
from collections.abc import Sequence
from typing import Any

from rlhf_jax.errors import InputError, short
from rlhf_jax.text import files

Message = dict[str, Any]


def render(tokenizer, messages: Sequence[Message], *, generation: bool = False) -> str:
    """The text of the messages; with `generation`, of the beginning of the assistant's turn after them too.

    Raises InputError where the tokenizer has no template, and where the template raises, as for an order of roles that
    it does not take, or does what the sandbox forbids.
    """
    if not tokenizer.template:
        raise InputError(
            "expected a tokenizer with a chat template, as the row is a conversation; give one with "
            f"--config.text.template=FILE, or {files.NONE} to read the contents as plain text"
        )
    values: dict[str, Any] = {"messages": messages, "add_generation_prompt": generation}
    values |= {"tools": None, "documents": None, **tokenizer.roles}
    try:
        return _compiled(tokenizer.template).render(values)
    except Exception as error:  # a template is a program: it can raise anything
        why = short(" ".join(str(error).split()) or "no message", 200)
        raise InputError(f"the chat template raised {type(error).__name__}: {why}") from None


def prompt(tokenizer, messages: Sequence[Message]) -> list[int]:
    """The ids of the messages, and of what begins the assistant's turn. Raises InputError as `render` does."""
    _check(tokenizer, messages)
    return tokenizer.encode_special(render(tokenizer, messages, generation=True))


def answer(tokenizer, messages: Sequence[Message], content: str) -> list[int]:
    """The ids of the assistant's turn after `prompt`, up to and including EOS.

    Where the template does not end the turn with an EOS, that is added. Raises InputError as `render` does, and where
    the template begins an assistant's turn in another way than it begins one to be completed.
    """
    reply = {"role": "assistant", "content": content}
    _check(tokenizer, [reply])
    before = render(tokenizer, messages, generation=True)
    whole = render(tokenizer, [*messages, reply])
    if not whole.startswith(before):
        raise InputError(
            "the chat template: expected an assistant's turn that begins as add_generation_prompt does, "
            f"{short(repr(before[-20:]))}"
        )
    if not whole.removeprefix(before).strip():
        raise InputError("the chat template: expected the content of the assistant's turn, got nothing")
    start, ids = tokenizer.encode_special(before), tokenizer.encode_special(whole)
    joined = ids[: len(start)] == start  # not so where a token lies across the border
    ids = ids[len(start) :] if joined else tokenizer.encode_special(whole.removeprefix(before))
    end = next((i for i, id in enumerate(ids) if id in tokenizer.eos_ids), None)
    return [*ids, tokenizer.eos_id] if end is None else ids[: end + 1]


def _check(tokenizer, messages):
    """Refuses contents that would be read as special tokens: only the template writes these."""
    for i, message in enumerate(messages, start=1):
        for name in tokenizer.special:
            if name in str(message.get("content", "")):
                where = f"message {i} ({message.get('role')})"
                raise InputError(f"{where}: expected text, got the name of a special token, {name!r}")


@functools.lru_cache(maxsize=4)
def _compiled(source: str):
    """The template, with the functions and settings that transformers gives it."""
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %}...{% endgeneration %}, which marks an assistant's turn: its contents are written."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(source)
