"""One value from a run, a folder or the hub: what it writes, and what it thinks of what was written."""

import dataclasses
import json
import logging

import jax
import numpy as np
import pytest

import rlhf_jax
from rlhf_jax import config as configs
from rlhf_jax import pretrained
from rlhf_jax.data import corpus
from rlhf_jax.errors import InputError
from rlhf_jax.models import hf
from rlhf_jax.text import bpe, char
from rlhf_jax.text import hf as text_hf


@pytest.fixture(scope="module")
def model(workdir):
    return rlhf_jax.load(workdir)


def error(function, *args, **kwargs):
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_same_bits(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


# load: a run


def test_the_last_policy_of_a_run_and_its_reward_model(model, apply, policy, scalar):
    assert_same_bits(model.params, policy)
    assert_same_bits(model.reward, scalar)
    assert (model.config, model.context, model.max_tokens) == (apply.policy.config, 40, 9)
    assert model.apply.policy.config == model.apply.scalar.config == model.config
    assert isinstance(model.tokenizer, char.CharTokenizer) and "Array" not in repr(model)


def test_it_is_loaded_without_a_word(workdir, caplog, capfd):
    level = logging.getLogger("absl").level
    rlhf_jax.load(workdir)
    assert not caplog.records and capfd.readouterr() == ("", "")
    assert logging.getLogger("absl").level == level


def test_another_stage_of_a_run(workdir, reference, scalar):
    sft = rlhf_jax.load(str(workdir), stage="sft")
    assert_same_bits(sft.params, reference)
    reward = rlhf_jax.load(workdir, stage="reward")
    assert reward.params is None
    assert_same_bits(reward.reward, scalar)


def test_a_run_without_a_reward_model_and_with_the_vocabulary_of_its_tokenizer(apply, finished, policy, tmp_path):
    sections = configs.write(
        model=dataclasses.replace(apply.policy.config, vocab_size=0), data=corpus.Config(length=12), seeds=2
    )
    (tmp_path / "config.json").write_text(json.dumps(configs.tree(sections)))
    char.CharTokenizer("abcdefghijklmnopqrstuvwxyz").save(tmp_path / "text")  # 26 and 3: as many as the policy has
    finished(tmp_path, "rl", policy=policy)
    model = rlhf_jax.load(tmp_path)
    assert_same_bits(model.params, policy)
    assert (model.reward, model.config.vocab_size, model.max_tokens) == (None, 29, 11)


def write_config(folder, workdir, **sections):
    """The config of the run with some sections changed, as nested dicts."""
    values = json.loads((workdir / "config.json").read_text())
    for name, fields in sections.items():
        values[name] = values[name] | fields if isinstance(fields, dict) else fields
    (folder / "config.json").write_text(json.dumps(values))


def test_a_stage_that_is_not_there_is_named(workdir, tmp_path):
    stages = "sft or reward or ppo"
    assert error(rlhf_jax.load, workdir, "pppo") == f"stage: expected {stages}, got 'pppo'"
    write_config(tmp_path, workdir)
    expected = f"{tmp_path}: expected a run with a finished stage that has a policy; there is none yet"
    assert error(rlhf_jax.load, tmp_path) == expected
    assert error(rlhf_jax.load, tmp_path, "sft") == "stage: expected a finished one (there is none), got 'sft'"
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward" / "summary.json").write_text("{}")
    assert error(rlhf_jax.load, tmp_path) == expected


AGAIN = "the command that trains the run writes it again"


def test_a_run_whose_config_is_damaged_is_named(tmp_path):
    """It is not taken for a folder of transformers without weights: a run has a lock."""
    (tmp_path / "lock").touch()
    (tmp_path / "config.json").write_text("")
    expected = f"workdir: {tmp_path}/config.json: expected the config of a run (Expecting value); {AGAIN}"
    assert error(rlhf_jax.load, tmp_path) == expected


def test_a_run_of_other_fields_is_named(workdir, tmp_path, finished, policy):
    write_config(tmp_path, workdir, model={"depth": 3})
    finished(tmp_path, "sft", policy=policy)
    assert (
        error(rlhf_jax.load, tmp_path)
        == f"workdir: {tmp_path}/config.json: model.depth: no such field; did you mean width?; {AGAIN}"
    )
    write_config(tmp_path, workdir)
    assert error(rlhf_jax.load, tmp_path).startswith(f"{tmp_path}/text/tokenizer.json: ")


# load: a folder, the hub


@pytest.fixture(scope="module")
def exported(tmp_path_factory, apply, policy, scalar):
    """(folder of a policy, folder of a reward model) as experiments/export_hf.py writes them."""
    config = dataclasses.replace(apply.policy.config, width=14)  # transformers has heads of width / heads
    init = jax.eval_shape(apply.policy.__class__(config).init, jax.random.key(0))
    noise = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: noise.normal(0, 0.5, leaf.shape).astype(np.float32), init)
    reward = {"trunk": params, "head": {"kernel": np.arange(1.0, 15, dtype=np.float32), "bias": np.float32(0)}}
    tokenizer = char.CharTokenizer("\n ./:DELOPRSTUabcdehimnrst")
    folders = [tmp_path_factory.mktemp("exported") / name for name in ("policy", "reward")]
    for folder, save, tree in zip(folders, (hf.save, hf.save_scalar), (params, reward), strict=True):
        save(folder, tree, config, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id, beside=text_hf.to_hf(tokenizer))
    return *folders, params, reward


def test_an_exported_policy(exported):
    folder, _, params, _ = exported
    model = rlhf_jax.load(folder)
    assert_same_bits(model.params, params)
    assert (model.reward, model.max_tokens, model.tokenizer.eos_id) == (None, 39, 27)
    assert len(model.generate("Sam", max_tokens=5)) == 1


def test_an_exported_reward_model(exported):
    _, folder, _, reward = exported
    model = rlhf_jax.load(folder)
    assert_same_bits(model.reward, reward)
    assert model.params is None and model.scores("Sam", ["a", "b"]).shape == (2,)
    assert error(model.generate, "Sam") == "generate: expected a policy, there is only a reward model"
    assert error(model.logprobs, "Sam", ["a"]) == "logprobs: expected a policy, there is only a reward model"


def test_a_tokenizer_with_a_pad_that_the_model_does_not_have(tmp_path, apply):
    """GPT-2's: the row of PAD is the mean row."""
    tokenizer = bpe.train([], 258)
    config = dataclasses.replace(apply.policy.config, width=14, vocab_size=257)
    params = jax.jit(apply.policy.__class__(config).init)(jax.random.key(0))
    files = text_hf.to_hf(tokenizer)
    files["tokenizer.json"]["added_tokens"] = [
        token for token in files["tokenizer.json"]["added_tokens"] if token["id"] < 257
    ]
    hf.save(tmp_path / "out", params, config, eos_id=256, pad_id=256, beside=files)
    model = rlhf_jax.load(tmp_path / "out")
    table = np.asarray(params["wte"]["embedding"])
    np.testing.assert_array_equal(model.params["wte"]["embedding"][:257], table)
    np.testing.assert_allclose(model.params["wte"]["embedding"][257], table.mean(axis=0), atol=1e-7)


def test_a_name_on_the_hub(exported, hub_server):
    files = {path.name: path.read_bytes() for path in exported[0].iterdir()}
    commit = hub_server.add("me/policy", files)
    hub_server.add("me/policy", {"README.md": "moved"})
    assert_same_bits(rlhf_jax.load(f"me/policy@{commit}").params, exported[2])
    assert error(rlhf_jax.load, "me/policy").startswith("me/policy: expected config.json and model.safetensors and tok")
    assert error(rlhf_jax.load, "me/no").startswith("me/no: no such file or folder, and no such model on the hub")


def test_what_is_no_model_is_named(exported, tmp_path):
    (tmp_path / "file").write_text("text")
    assert error(rlhf_jax.load, tmp_path / "file").endswith("file: expected a folder or a name on the hub, got a file")
    assert error(rlhf_jax.load, tmp_path / "no").endswith("and not a possible name of a model on the hub")
    assert error(rlhf_jax.load, tmp_path).startswith(f"{tmp_path}: expected a folder with config.json and ")
    message = f"stage: expected none, as {exported[0]} is not the folder of a run, got 'sft'"
    assert error(rlhf_jax.load, exported[0], stage="sft") == message


# generate


PROMPTS = ["TL/DR:", "Sam is sad. ", "POST: a"]


def test_texts_of_each_prompt_one_after_another(model):
    one = [model.generate(prompt, n=3) for prompt in PROMPTS[:1]]
    assert model.generate(PROMPTS, n=3)[:3] == one[0] and len(model.generate(PROMPTS, n=3)) == 9
    assert model.generate(PROMPTS[0]) == one[0][:1] and len(set(one[0])) == 3
    assert model.generate(PROMPTS)[1] == model.generate(PROMPTS, n=3)[3]
    assert model.generate([]) == []
    assert len(model.generate(PROMPTS, n=12)) == 36  # more than are on the device at a time


def test_the_seed_is_the_noise(model):
    assert model.generate(PROMPTS, n=4) == model.generate(PROMPTS, n=4, seed=0) != model.generate(PROMPTS, n=4, seed=1)


def test_top_k_of_one_and_temperature_zero_are_the_likeliest(model):
    likeliest = model.generate(PROMPTS, temperature=0)
    assert model.generate(PROMPTS, top_k=1) == likeliest == model.generate(PROMPTS, top_p=1e-6, seed=5)


def test_widths_are_few_and_never_more_than_the_limit():
    assert [pretrained._width(longest, 40) for longest in (1, 16, 17, 32, 33, 40)] == [16, 16, 32, 32, 40, 40]
    assert pretrained._width(3, 9) == 9


def test_other_prompts_of_about_the_same_length_do_not_compile(model, compilations):
    model.generate("Sam is sad", max_tokens=6)
    model.logprobs("Sam is sad", ["Ed"])
    model.scores("Sam is sad", ["Ed"])
    with compilations() as names:
        model.generate("POST", max_tokens=6, seed=3)
        model.logprobs("POST", ["a mess"], temperature=0.5)
        model.scores("POST", ["a mess"])
    assert not {name for name in names if name in ("_sample", "_logprobs", "_score")}, names


def test_a_prompt_may_fill_the_context_but_for_max_tokens(model):
    assert len(model.generate("a" * 31)) == 1
    expected = "expected at most 31 tokens, the context of 40 without max_tokens = 9, got 32"
    assert error(model.generate, ["a", "a" * 32]) == f"prompts[1]: {expected}"
    assert error(model.generate, "a" * 31, max_tokens=10).startswith("prompts[0]: expected at most 30 tokens, ")


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("n", 0, "at least 1"),
        ("max_tokens", 0, "1 to 39, the context is 40"),
        ("max_tokens", 40, "1 to 39, the context is 40"),
        ("temperature", -1.0, "0 or more"),
        ("top_k", -1, "0 (all) or more"),
        ("top_p", 0.0, "more than 0 and at most 1 (all)"),
        ("top_p", 1.5, "more than 0 and at most 1 (all)"),
        ("seed", -1, "0 to 2^32 - 1"),
        ("seed", 2**32, "0 to 2^32 - 1"),
    ],
)
def test_a_choice_out_of_range_is_named(field, value, expected, model):
    assert error(model.generate, "a", **{field: value}) == f"{field}: expected {expected}, got {value!r}"


def test_what_is_no_text_is_named(model):
    assert error(model.generate, ["a", 3]) == "prompts[1]: expected a text, got int"
    assert error(model.generate, ["a", "€"]).startswith("prompts[1]: text with no known characters")
    assert error(model.logprobs, "a", ["b", None]) == "completions[1]: expected a text, got NoneType"
    assert error(model.scores, "a", "b") == "completions: expected a list of texts, got one text"
    assert error(model.scores, ["a"], ["b", "c"]) == "completions: expected one for each of 1 prompts, got 2"
    assert error(model.logprobs, "a", ["b"], temperature=0) == "temperature: expected more than 0, got 0"


# logprobs, scores


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampler_and_learner_agree(temperature, model):
    """The same tokens, in the sampler's columns and in one row each of another width."""
    prompts = model._prompts([*PROMPTS, "", "a" * 25])
    how = {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    response_NR, mask_NR, logp_NR = model._draw(prompts, 8, 15, 0, how)
    responses = [ids[mask].tolist() for ids, mask in zip(response_NR, mask_NR, strict=True)]
    logps = model.logprob_tokens([ids for ids in prompts for _ in range(8)], responses, temperature)
    assert min(map(len, responses)) < 15 == max(map(len, responses))  # EOS ends some of them
    for sampled, learned, mask in zip(logp_NR, logps, mask_NR, strict=True):
        np.testing.assert_allclose(sampled[mask], learned, atol=1e-4)


def test_tokens_of_a_completion_by_hand(model, apply, policy):
    """A space, the text without space around it, and EOS; after an empty prompt the text as it is, and EOS."""
    encode, eos = model.tokenizer.encode, [model.tokenizer.eos_id]
    for prompt, completion, start, end in [
        ("Sam:", " is sad \n", encode("Sam:"), encode(" is sad") + eos),
        ("", "Sam ", eos, encode("Sam ") + eos),
    ]:
        tokens_1T = np.array([start + end])
        logp_1R = apply.policy.logprobs(policy, tokens_1T, np.ones_like(tokens_1T), len(end))
        (logp_R,) = model.logprobs(prompt, [completion])
        np.testing.assert_allclose(logp_R, logp_1R[0], atol=1e-5)


def test_a_prompt_may_be_a_conversation(model):
    """One, or a list of them among texts; the chat template writes it, and the answer ends as the template ends it."""
    template = "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}a: {% endif %}"
    chatty = dataclasses.replace(model, tokenizer=dataclasses.replace(model.tokenizer, template=template))
    sam = [{"role": "user", "content": "Sam"}]
    encode = model.tokenizer.encode
    texts = chatty.generate([sam, "Sam"], n=2, max_tokens=5, seed=3)
    drawn = chatty.sample([encode("u: Sam\na: "), encode("Sam")], n=2, max_tokens=5, seed=3)
    assert texts == [sample.text for sample in drawn] and chatty.generate(sam, n=2, max_tokens=5, seed=3) == texts[:2]
    (logp_R,), tokens = chatty.logprobs(sam, ["sad"]), [*encode("sad\n"), model.tokenizer.eos_id]
    np.testing.assert_array_equal(logp_R, chatty.logprob_tokens([encode("u: Sam\na: ")], [tokens])[0])
    assert error(model.generate, sam).startswith("prompts[0]: expected a tokenizer with a chat template, as the ")


def test_a_completion_is_worth_the_same_beside_others(model):
    texts = ["a", "the meat is red", ""]
    together, scores = model.logprobs(PROMPTS, texts), model.scores(PROMPTS, texts)
    for prompt, text, logp_R, score in zip(PROMPTS, texts, together, scores, strict=True):
        np.testing.assert_allclose(logp_R, model.logprobs([prompt], [text])[0], atol=1e-5)
        np.testing.assert_allclose(score, model.scores(prompt, [text])[0], atol=1e-5)
    assert [len(logp_R) for logp_R in together] == [3, 17, 2]
    assert model.logprobs([], []) == [] and model.scores("a", []).shape == (0,)


def test_more_rows_than_fit_on_the_device_at_a_time(model, monkeypatch):
    texts = ["a", "the", "meat", "is", "red"]
    scores, logps = model.scores("a", texts), model.logprobs("a", texts)
    monkeypatch.setattr(pretrained, "ROWS", (1, 2))
    np.testing.assert_allclose(model.scores("a", texts), scores, atol=1e-5)
    np.testing.assert_allclose(np.concatenate(model.logprobs("a", texts)), np.concatenate(logps), atol=1e-5)


def test_a_score_is_read_at_the_end(model, apply, scalar):
    tokens_1T = np.array([model.tokenizer.encode("Sam: sad") + [model.tokenizer.eos_id]])
    expected = apply.scalar.score(scalar, tokens_1T, np.ones_like(tokens_1T))
    np.testing.assert_allclose(model.scores("Sam:", ["sad"]), expected, atol=1e-5)


def test_prompt_and_completion_may_fill_the_context(model):
    (logp_R,) = model.logprobs("a" * 30, ["e" * 8])  # a space and EOS come to it
    assert logp_R.shape == (10,) and np.isfinite(logp_R).all()
    expected = "expected at most 40 tokens with prompts[1], the context, got 30 + 11"
    assert error(model.scores, ["a", "a" * 30], ["e", "e" * 9]) == f"completions[1]: {expected}"


def test_without_a_reward_model_there_are_no_scores(exported):
    message = "scores: expected a reward model; a run has one when its reward stage is finished"
    assert error(rlhf_jax.load(exported[0]).scores, "a", ["b"]) == message


# stream


def rows_of(tokens):
    """The ids of each row of a stream."""
    rows = range(len(tokens[0].mask_B))
    return [[int(token.token_B[b]) for token in tokens if token.mask_B[b]] for b in rows]


@pytest.mark.parametrize("how", [{}, {"temperature": 0}])
def test_a_stream_is_what_is_sampled(how, model):
    """Whatever stands in the other rows, and from any place in a list of prompts."""
    ids = model._prompts(PROMPTS)
    sampled = model.sample(ids, seed=3, **how)
    assert [sample.text for sample in sampled] == model.generate(PROMPTS, seed=3, **how)
    for i, sample in enumerate(sampled):
        assert rows_of(list(model.stream(ids[i], seed=3, first=i, **how))) == [sample.ids]
        assert sample.ended == (sample.ids[-1] == model.tokenizer.eos_id)
    assert [sample.ids for sample in model.sample(ids[1:], seed=3, first=1, **how)] == [s.ids for s in sampled[1:]]


def test_a_stream_has_the_log_probs_of_the_learner(model, reference):
    """invariant 4, for both policies on both texts, under all of the vocabulary."""
    (ids,) = model._prompts(["Sam is"])
    policies = model, model.with_policy(reference)
    tokens = list(model.stream(ids, beside=[reference], max_tokens=12, seed=3, temperature=0.5, top_k=9, top_p=0.9))
    for b, response in enumerate(rows_of(tokens)):
        logp_MR = np.stack([token.logp_MB[:, b] for token in tokens if token.mask_B[b]], axis=1)
        for m, policy in enumerate(policies):
            (expected_R,) = policy.logprob_tokens([ids], [response], 0.5)
            np.testing.assert_allclose(logp_MR[m], expected_R, atol=1e-4)


def test_a_stream_of_several_rows(model):
    """Sample j has noise of its own; rows that fill up the batch are not there."""
    (ids,) = model._prompts(PROMPTS[:1])
    tokens = list(model.stream(ids, n=3))
    assert rows_of(tokens) == [sample.ids for sample in model.sample([ids], n=3)]
    assert tokens[0].best_MBC.shape == (1, 3, 8)


def test_other_settings_of_a_stream_compile_nothing(model, compilations):
    (ids,) = model._prompts(["Sam is"])
    list(model.stream(ids, max_tokens=3))
    with compilations() as names:
        list(model.stream(ids[:-1], max_tokens=5, temperature=0.7, top_k=3, top_p=0.5, seed=9, forced=ids[:2]))
    assert not {name for name in names if name.startswith("_read")}, names


def test_a_stream_refuses_what_cannot_be_sampled(model):
    assert error(model.stream, [3], top_p=0.0) == "top_p: expected more than 0 and at most 1 (all), got 0.0"
    assert error(model.stream, [3] * 32).startswith("prompts[0]: expected at most 31 tokens, ")


# rl: a stage


def test_rows_of_prompts_have_no_other_texts_to_mix_in(model):
    rows = [{"prompt": f"Sam {i}"} for i in range(20)]
    message = error(model.rl, rows, lambda texts: [0.0 for _ in texts], batch=8, ptx_coef=0.1)
    assert message == "ptx_coef: expected 0, as rows of prompts have no other texts, got 0.1"
