"""Rows that are conversations, in the shapes that data sets of the hub have, as rows of ours.

A conversation is a list of messages {"role", "content"}. A row has one of

    messages                    the whole conversation; its last message, the assistant's, is the label
    prompt, label               the messages before the answer, and the answer as a list of messages
    prompt, chosen, rejected    the same with two answers; they may repeat the prompt
    chosen, rejected            two whole conversations that differ in their last message
    prompt                      the messages to answer

Ours is {"prompt": the contents as text, "conversation": the messages before the answer, and each answer as text}. The
text is for people and rewards; a policy reads the messages through its chat template (text/chat.py).
"""

from typing import Any

from rlhf_jax.errors import InputError, short

MESSAGES = "messages"  # the column of whole conversations in data sets
KEY = "conversation"  # of the messages before the answer in a row of ours
BETWEEN = "\n\n"  # the contents, as plain text
ANSWERS = ("label", "chosen", "rejected")


def row(values: dict[str, Any], columns: tuple[str, ...]) -> dict[str, Any]:
    """Ours of a row with these columns, by our names, or with those of a conversation; all its others stay.

    A row of texts is returned as it is. Raises InputError, naming the column, for a row of texts and conversations, and
    for a list that is no conversation.
    """
    values = {name: value for name, value in values.items() if name != KEY}
    there = [name for name in columns if name in values]
    if len(there) < len(columns) and "chosen" not in columns:
        whole = _messages(MESSAGES, values[MESSAGES])
        answers = {"label": whole[-1]} if whole[-1]["role"] == "assistant" else {}
        return values | _row(whole[: len(whole) - len(answers)], answers)
    chats = [name for name in there if isinstance(values[name], list)]
    if not chats and len(there) == len(columns):
        return values
    if mixed := [name for name in there if name not in chats]:
        why = f"as {chats[0]} is" if chats else "as there is no column 'prompt'"
        got = type(values[mixed[0]]).__name__.replace("str", "text")
        raise InputError(f"{mixed[0]}: expected a conversation, {why}, got {got}")
    found = {name: _messages(name, values[name]) for name in chats}
    before = found.pop("prompt", [])
    if not found and before[-1]["role"] == "assistant":
        raise InputError("prompt: expected a conversation to answer, got one that ends with the assistant's turn")
    found = {name: _after(messages, before) for name, messages in found.items()}
    between = next((messages[:-1] for messages in found.values()), [])
    if different := [name for name, messages in found.items() if messages[:-1] != between]:
        raise InputError(f"{different[0]}: expected the messages of {chats[-len(found)]} before the last one")
    return values | _row(before + between, {name: messages[-1] for name, messages in found.items()})


def _row(before: list[dict], answers: dict[str, dict]) -> dict[str, Any]:
    if not before:
        raise InputError("expected a message before the assistant's turn, got none")
    for name, message in answers.items():
        if message["role"] != "assistant":
            got = f"the turn of {short(message['role'])}"
            raise InputError(f"{name}: expected a conversation that ends with the assistant's turn, got {got}")
    prompt = BETWEEN.join(message["content"] for message in before)
    return {"prompt": prompt, KEY: before} | {name: message["content"] for name, message in answers.items()}


def _after(messages: list[dict], before: list[dict]) -> list[dict]:
    """The messages without those of the prompt, which they may repeat."""
    return messages[len(before) :] if messages[: len(before)] == before != messages else messages


def _messages(column: str, value: Any) -> list[dict]:
    """The messages of a conversation, without fields that are None, as Parquet fills them up."""
    if not isinstance(value, list) or not value:
        raise InputError(f"{column}: expected a list of messages, got {short(repr(value))}")
    found = []
    for i, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            kind = ", ".join(map(str, message)) if isinstance(message, dict) else type(message).__name__
            expected = "expected messages with texts role and content"
            raise InputError(f"{column}: {expected}, got {short(kind)} in message {i}")
        try:
            message["content"].encode()
        except UnicodeEncodeError:
            raise InputError(f"{column}: expected text, got half of a surrogate pair in message {i}") from None
        found.append({key: field for key, field in message.items() if field is not None})
    return found
