"""The completions API, through OpenAI's own client."""

import openai
import pytest

from tests.viz.conftest import ADDRESS

PROMPT = "Sam is sad"


@pytest.fixture
def api(client):
    return openai.OpenAI(base_url=f"{ADDRESS}/v1", api_key="secret", http_client=client, max_retries=0)


def complete(api, **values):
    return api.completions.create(**{"model": "ppo", "prompt": PROMPT, "max_tokens": 9, "seed": 3} | values)


def sampled(run, prompts=(PROMPT,), stage="ppo", **how):
    """What the library samples: Sample values."""
    ids = run.model._prompts(prompts)
    return run.model.with_policy(run.policy(stage)).sample(ids, seed=3, **how)


def test_models(api):
    assert [model.id for model in api.models.list()] == ["sft", "ppo"]
    assert api.models.retrieve("sft").owned_by == "rlhf_jax"
    with pytest.raises(openai.NotFoundError, match="the models are sft, ppo") as caught:
        api.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found"


def test_texts_are_those_of_the_library(api, run):
    answer = complete(api, prompt=[PROMPT, "TL/DR:"], n=2)
    samples = sampled(run, [PROMPT, "TL/DR:"], n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text.strip() for choice in answer.choices] == [sample.text for sample in samples]
    reasons = ["stop" if sample.ended else "length" for sample in samples]
    assert [choice.finish_reason for choice in answer.choices] == reasons
    counts = len(PROMPT) + len("TL/DR:"), sum(len(sample.ids) for sample in samples)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == counts
    assert answer.usage.total_tokens == sum(counts) and answer.object == "text_completion"


def test_other_models_and_settings(api, run):
    assert complete(api, model="sft").choices[0].text.strip() == sampled(run, stage="sft")[0].text
    likeliest = complete(api, temperature=0).choices[0].text
    assert likeliest.strip() == sampled(run, temperature=0)[0].text
    assert complete(api, extra_body={"top_k": 1}).choices[0].text == likeliest
    ids = run.model.tokenizer.encode(PROMPT)
    assert complete(api, prompt=ids).choices[0].text == complete(api).choices[0].text
    assert complete(api, prompt=[ids, ids]).choices[0].text == complete(api).choices[0].text


def test_without_a_seed_each_request_has_its_own(api):
    first, second = (complete(api, seed=None, max_tokens=1).model_extra["seed"] for _ in range(2))
    assert first != second


@pytest.mark.parametrize("how", [{}, {"n": 2, "stop": ["e", "s"], "logprobs": 1}])
def test_a_stream_amounts_to_the_whole(how, api):
    whole = complete(api, **how)
    chunks = list(complete(api, stream=True, stream_options={"include_usage": True}, **how))
    for choice in whole.choices:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        reasons = [part.finish_reason for part in parts]
        assert reasons == [None] * (len(parts) - 1) + [choice.finish_reason] and len(parts) > 1
        if choice.logprobs:
            assert [token for part in parts for token in part.logprobs.tokens] == choice.logprobs.tokens
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
    assert all(chunk.choices for chunk in complete(api, stream=True))  # no usage unless requested


def test_log_probs_are_those_of_the_sampler(api, run):
    (choice,), (sample,) = complete(api, logprobs=3).choices, sampled(run)
    found = choice.logprobs
    assert found.token_logprobs == pytest.approx(sample.logp_R.tolist(), abs=1e-4)
    assert "".join(found.tokens).replace("<|endoftext|>", "") == choice.text
    assert found.text_offset == list(range(len(found.tokens)))  # a token is a character
    assert {len(top) for top in found.top_logprobs} == {3}
    for token, logp, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert top.get(token, logp) == pytest.approx(logp, abs=1e-5) and max(top.values()) >= logp - 1e-5


def test_a_stop_text_ends_a_completion(api):
    text = complete(api).choices[0].text
    (choice,) = complete(api, stop=text[2:4]).choices
    assert (choice.text, choice.finish_reason) == (text[: text.index(text[2:4])], "stop")
    assert complete(api, stop="\u20ac").choices[0].text == text


def test_nothing_is_lost_where_a_stop_text_only_begins(api):
    text = complete(api).choices[0].text
    chunks = list(complete(api, stream=True, stop=text[1:3] + "\u20ac"))
    assert "".join(chunk.choices[0].text for chunk in chunks) == text


@pytest.mark.parametrize(
    ("values", "param", "message"),
    [
        ({"temperature": -1}, "temperature", "temperature: expected at least 0 and at most 100, got -1.0"),
        ({"top_p": 0}, "top_p", "top_p: expected more than 0 and at most 1, got 0.0"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens: expected at least 1, got 0"),
        ({"max_tokens": 1.5}, "max_tokens", "max_tokens: expected at least 1, got 1.5"),
        ({"n": 9}, "n", "n: expected 1 to 8, got 9"),
        ({"logprobs": 6}, "logprobs", "logprobs: expected 0 to 5, got 6"),
        ({"seed": -1}, "seed", "seed: expected at least 0"),
        ({"stop": [""]}, "stop", "stop: expected a text or a list of texts, got"),
        ({"stop": list("abcde")}, "stop", "stop: expected at most 4 texts, got 5"),
        ({"prompt": []}, "prompt", "prompt: expected at least one, got none"),
        ({"prompt": [29]}, "prompt", "prompt: expected ids from 0 to 28, got 29"),
        ({"prompt": ["a", 1]}, "prompt", "prompt: expected a text, a list of texts, ids or lists of ids"),
        ({"prompt": "\u20ac"}, "prompt", "prompt: text with no known characters"),
        ({"echo": True}, "echo", "echo: expected its default, as this server has no other, got True"),
        ({"extra_body": {"promt": 1}}, "promt", "Unrecognized request argument supplied: promt"),
        ({"stream": 3}, "stream", "stream: expected true or false, got 3"),
    ],
)
def test_errors_are_of_openais_shape(values, param, message, api):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(api, **values)
    assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")
    assert message in caught.value.body["message"]


def test_other_errors(api, visitor):
    with pytest.raises(openai.NotFoundError, match="model"):
        complete(api, model="gpt-4")
    with pytest.raises(openai.BadRequestError, match="maximum context length is 40 tokens") as caught:
        complete(api, prompt="a" * 40)
    assert caught.value.code == "context_length_exceeded"
    stranger = openai.OpenAI(base_url=f"{ADDRESS}/v1", api_key="wrong", http_client=visitor, max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        complete(stranger)
    with pytest.raises(openai.NotFoundError):
        api.chat.completions.create(model="ppo", messages=[{"role": "user", "content": "a"}])


def test_a_billion_tokens_are_as_many_as_the_context_has(api):
    (choice,) = complete(api, max_tokens=10**9, prompt="a" * 30, temperature=0).choices
    assert len(choice.text) <= 10
