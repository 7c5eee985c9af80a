"""OpenAI's completions API for the policies of a run: requests -> chunks, responses and errors, all as JSON values.

A model is named by its stage. Log-probs are in nats, of the whole vocabulary at the temperature of the request,
whatever top_p and top_k leave of it; EOS is a token with a log-prob, but no text. A completion's text is as it was
sampled, with the space that it begins with. Without a seed one is chosen, and `seed` of the response has it.
"""

import codecs
import dataclasses
import secrets
import time
from collections.abc import Iterator
from typing import Any

from rlhf_jax.errors import InputError
from rlhf_jax.viz.playground import Prompt, Run, Settings, settings

MOST = {"n": 8, "prompts": 16, "logprobs": 5, "stop": 4}  # limits of one request
MAX_TOKENS = 16  # OpenAI's default

# Fields that are read; those of OpenAI that change nothing here; and those that must have their default.
READ = (
    *("model", "prompt", "max_tokens", "temperature", "top_p", "top_k"),
    *("n", "stream", "stream_options", "logprobs", "stop", "seed"),
)
IGNORED = ("user",)
DEFAULTS = {
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "suffix": (None, ""),
}


class ApiError(Exception):
    """An error as OpenAI's clients expect it."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict:
        """The JSON of the response."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclasses.dataclass(frozen=True)
class Request:
    """A request for completions, checked."""

    stage: str
    prompts: list[Prompt]
    how: Settings
    n: int
    stream: bool
    usage: bool  # in the last chunk of a stream
    logprobs: int | None
    stop: tuple[str, ...]


def models(run: Run) -> dict:
    """The list of models."""
    return {"object": "list", "data": [model(run, stage) for stage in run.stages]}


def model(run: Run, stage: str) -> dict:
    """One model."""
    if stage not in run.stages:
        found = f"the models are {', '.join(run.stages) or 'none'}"
        raise ApiError(
            f"The model {stage!r} does not exist: {found}", status=404, param="model", code="model_not_found"
        )
    created = int((run.workdir / "config.json").stat().st_mtime)
    return {"id": stage, "object": "model", "created": created, "owned_by": "rlhf_jax"}


def parse(run: Run, values: dict) -> Request:
    """The Request of a JSON object. Raises ApiError."""
    if run.missing:
        raise ApiError(run.missing, status=404, param="model", code="model_not_found")
    for name, value in values.items():
        if name in DEFAULTS and value not in DEFAULTS[name]:
            raise ApiError(f"{name}: expected its default, as this server has no other, got {value!r}", param=name)
        if name not in (*READ, *IGNORED, *DEFAULTS):
            raise ApiError(f"Unrecognized request argument supplied: {name}", param=name)
    stage = values.get("model")
    if not isinstance(stage, str):
        raise ApiError("you must provide a model parameter", param="model")
    model(run, stage)
    n, stream = _whole(values, "n", 1, 1, MOST["n"]), _flag(values, "stream")
    logprobs = None if values.get("logprobs") is None else _whole(values, "logprobs", 0, 0, MOST["logprobs"])
    options = values.get("stream_options") or {}
    if not isinstance(options, dict):
        raise ApiError(f"stream_options: expected an object, got {options!r}", param="stream_options")
    seed = values.get("seed")
    given: dict[str, Any] = {"seed": secrets.randbits(32) if seed is None else seed}
    given["max_tokens"] = _whole(values, "max_tokens", MAX_TOKENS, 1, 2**63)
    given["max_tokens"] = min(given["max_tokens"], run.config.model.context)
    given |= {name: values[name] for name in ("temperature", "top_p", "top_k") if values.get(name) is not None}
    try:
        how = settings(given)
    except InputError as error:
        raise ApiError(str(error), param=str(error).split(":")[0]) from None
    prompts = _prompts(run, values.get("prompt"))
    return Request(stage, prompts, how, n, stream, _flag(options, "include_usage"), logprobs, _stop(values.get("stop")))


def _whole(values, name, default, least, most):
    value = values.get(name)
    value = default if value is None else value
    if type(value) is not int or not least <= value <= most:
        expected = f"{least} to {most}" if most < 2**63 else f"at least {least}"
        raise ApiError(f"{name}: expected {expected}, got {value!r}", param=name)
    return value


def _flag(values, name):
    value = values.get(name)
    if value not in (None, True, False):
        raise ApiError(f"{name}: expected true or false, got {value!r}", param=name)
    return bool(value)


def _stop(value):
    texts = [value] if isinstance(value, str) else value or []
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise ApiError(f"stop: expected a text or a list of texts, got {value!r}", param="stop")
    if len(texts) > MOST["stop"]:
        raise ApiError(f"stop: expected at most {MOST['stop']} texts, got {len(texts)}", param="stop")
    return tuple(texts)


def _prompts(run, value):
    """The Prompts of a text, a list of texts, ids, or a list of lists of ids."""
    value = "" if value is None else value  # OpenAI's default: the beginning of a text
    several = isinstance(value, list) and value and not isinstance(value[0], int)
    given = value if several else [value]
    if not several and value == []:
        raise ApiError("prompt: expected at least one, got none", param="prompt")
    if len(given) > MOST["prompts"]:
        raise ApiError(f"prompt: expected at most {MOST['prompts']} prompts, got {len(given)}", param="prompt")
    prompts, longest = [], run.model.context - 1
    for prompt in given:
        if isinstance(prompt, str):
            try:
                ids = run.model.tokenizer.begin + run.model.tokenizer.encode(prompt)
            except InputError as error:
                raise ApiError(f"prompt: {error}", param="prompt") from None
            if run.config.task == "write" or not ids:
                ids = [run.model.tokenizer.eos_id, *ids]  # which stands before every text
        else:
            ids = _ids(prompt, run.model.tokenizer.vocab_size)
        if len(ids) > longest:
            raise ApiError(
                f"This model's maximum context length is {run.model.context} tokens, of which a completion needs at "
                f"least one; your prompt has {len(ids)}. Please reduce its length.",
                param="prompt", code="context_length_exceeded",
            )  # fmt: skip
        prompts.append(Prompt(prompt if isinstance(prompt, str) else "", ids))
    return prompts


def _ids(prompt, vocab_size):
    if not isinstance(prompt, list) or not prompt:
        raise ApiError("prompt: expected a text, a list of texts, ids or lists of ids", param="prompt")
    for id in prompt:
        if type(id) is not int or not 0 <= id < vocab_size:
            raise ApiError(f"prompt: expected ids from 0 to {vocab_size - 1}, got {id!r}", param="prompt")
    return prompt


def complete(run: Run, request: Request) -> Iterator[dict]:
    """Yields chunks: each has one choice with more of its text; then the usage, if requested."""
    head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time())}
    head |= {"model": request.stage, "seed": request.how.seed}
    counts = {"prompt_tokens": 0, "completion_tokens": 0}
    for p, prompt in enumerate(request.prompts):
        counts["prompt_tokens"] += len(prompt.ids)
        choices = [_Choice(run, request, p * request.n + j) for j in range(request.n)]
        stages = (request.stage,)
        room = min(request.how.max_tokens, run.model.context - len(prompt.ids))
        for token in run.tokens(prompt, request.how, stages, room, n=request.n, first=p):
            for b, choice in enumerate(choices):
                if token.mask_B[b] and choice.reason is None:
                    counts["completion_tokens"] += 1
                    choice.add(token, b, last=choice.count + 1 == room)
                    if (part := choice.take()) is not None:
                        yield head | {"choices": [part]}
            if all(choice.reason for choice in choices):
                break
    counts["total_tokens"] = sum(counts.values())
    yield head | {"choices": [], "usage": counts}


def whole(chunks: Iterator[dict]) -> dict:
    """The response that the chunks of `complete` amount to."""
    choices: dict[int, dict] = {}
    response: dict = {}
    for chunk in chunks:
        response |= chunk
        for part in chunk["choices"]:
            choice = choices.setdefault(part["index"], part)
            if choice is not part:
                choice["text"] += part["text"]
                choice["finish_reason"] = part["finish_reason"]
                for name, more in (part["logprobs"] or {}).items():
                    choice["logprobs"][name] += more
    return response | {"choices": [choices[index] for index in sorted(choices)]}


class _Choice:
    """One completion while it is sampled: what is known of it, and how much of that was sent."""

    def __init__(self, run, request, index):
        self.run, self.request, self.index = run, request, index
        self.reason: str | None = None  # why it has ended
        self.count = 0  # tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be several tokens
        self._text, self._sent = "", 0
        self._logprobs: dict[str, list] = self._empty()

    @staticmethod
    def _empty():
        return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def add(self, token, b, last):
        """One more token, number b of the rows; `last`: no other comes."""
        id, tokenizer = int(token.token_B[b]), self.run.model.tokenizer
        self.count += 1
        ended = id in tokenizer.eos_ids
        if self.request.logprobs is not None:
            self._note(token, b, id)
        self._text += self._decoder.decode(b"" if ended else tokenizer.token_bytes(id), final=ended or last)
        ends = [place for stop in self.request.stop if (place := self._text.find(stop)) >= 0]
        if ends:
            self._text, self.reason = self._text[: min(ends)], "stop"
        elif ended or last:
            self.reason = "stop" if ended else "length"

    def _note(self, token, b, id):
        best = zip(token.best_MBC[0, b].tolist(), token.best_logp_MBC[0, b].tolist(), strict=True)
        self._logprobs["tokens"].append(self._name(id))
        self._logprobs["token_logprobs"].append(float(token.logp_MB[0, b]))
        top = {self._name(other): logp for other, logp in list(best)[: self.request.logprobs]}
        self._logprobs["top_logprobs"].append(top or None)
        self._logprobs["text_offset"].append(len(self._text))

    def _name(self, id):
        """A token as OpenAI writes it: its text, or bytes:\\xNN where it is a part of a character."""
        label = self.run.label(id)
        if "special" in label:
            return f"<|{'endoftext' if label['special'] == 'EOS' else 'pad'}|>"
        try:
            return self.run.model.tokenizer.token_bytes(id).decode()
        except UnicodeDecodeError:
            return f"bytes:{label['text']}"

    def take(self):
        """The choice of the next chunk, or None where nothing can be sent yet: a stop text may have begun."""
        safe = len(self._text)
        if self.reason is None:
            safe -= max((_begun(self._text, stop) for stop in self.request.stop), default=0)
        text = self._text[self._sent : safe]
        if not text and self.reason is None and not self._logprobs["tokens"]:
            return None
        self._sent = safe
        noted, self._logprobs = self._logprobs, self._empty()
        logprobs = noted if self.request.logprobs is not None else None
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": self.reason}


def _begun(text: str, stop: str) -> int:
    """The length of the longest beginning of `stop` that `text` ends with."""
    return next((size for size in range(len(stop) - 1, 0, -1) if text.endswith(stop[:size])), 0)
