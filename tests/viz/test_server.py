"""The server: what it refuses, what it sends, and one job at a time."""

import asyncio
import dataclasses
import json
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from rlhf_jax import config as configs
from rlhf_jax import text
from rlhf_jax.data import chats, sources, tldr
from rlhf_jax.stages import Setup
from rlhf_jax.stages.preference import reward_model
from rlhf_jax.tasks.prompts import Prompts
from rlhf_jax.viz import playground, server
from rlhf_jax.viz.playground import Run
from tests import support
from tests.viz.conftest import ADDRESS, TOKEN

PROMPT = {"prompt": "Sam is sad", "settings": {"seed": 3}}


def events(response):
    """The server-sent events of a response."""
    assert response.status_code == 200, response.text
    lines = [line for line in response.text.split("\n\n") if line]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def write(client, **values):
    """(the start, the tokens, the end) of a comparison."""
    first, *tokens, end = events(client.post("/api/generate", json=PROMPT | values))
    assert (first["event"], end["event"]) == ("start", "end"), end
    return first, tokens, end


# What it refuses


def test_files_and_headers(visitor):
    page = visitor.get("/")
    assert (page.status_code, page.text) == (200, "<!doctype html><title>A run</title>")
    script = visitor.get("/page.js")
    assert script.headers["content-type"].startswith("text/javascript")
    trace = visitor.get("/trace/iter_000001.json.gz")
    assert (trace.content, trace.headers["content-type"]) == (b"\x1f\x8b", "application/octet-stream")
    assert "content-encoding" not in trace.headers  # the page unpacks it, as on any static host
    for response in page, script, trace, visitor.get("/no"), visitor.post("/api/generate"):
        assert server.HEADERS.items() <= {name.title(): value for name, value in response.headers.items()}.items()
    assert "unsafe" not in page.headers["content-security-policy"]


@pytest.mark.parametrize(
    "path",
    ["/no", "/../config.json", "/%2e%2e/config.json", "/..%2fconfig.json", "/page.js/%2e%2e", "/index.html/", "/%2f"]
    + ["/trace/no", "/trace/../config.json", "/trace/%2e%2e%2fconfig.json", "/trace/%2e%2e", "/trace/", "/trace"],
)
def test_there_is_nothing_beside_the_files(path, visitor):
    assert visitor.get(path).status_code == 404


@pytest.mark.parametrize(
    "host", ["evil.com", "127.0.0.1.evil.com", "localhost.evil.com:8000", "127.0.0.1:8000@evil", ""]
)
def test_another_host_is_refused(host, visitor):
    for path in "/", "/api/info", "/v1/models", "/no":
        assert visitor.get(path, headers={"host": host}).status_code == 403


@pytest.mark.parametrize("host", ["localhost", "localhost:9999", "[::1]:8000", "127.0.0.1"])
def test_this_machine_is_not(host, visitor):
    assert visitor.get("/", headers={"host": host}).status_code == 200


def test_a_post_needs_the_token_and_comes_from_the_page(visitor, client):
    post = {"url": "/api/vote", "json": {"id": "0", "choice": -1}}
    assert visitor.post(**post).status_code == 403
    assert visitor.post(**post, headers={"Authorization": "Bearer wrong"}).status_code == 403
    assert visitor.post("/v1/completions", json={}).json()["error"]["code"] == "invalid_api_key"
    assert client.post(**post).status_code == 400  # there is no such pair
    for headers in {"Origin": "http://evil.com"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}:
        assert client.post(**post, headers=headers).status_code == 403
    assert client.post(**post, headers={"Origin": ADDRESS, "Sec-Fetch-Site": "same-origin"}).status_code == 400


def test_the_printed_url_leaves_a_cookie_and_no_trace_of_the_token(visitor):
    assert visitor.get("/api/info").json()["authorized"] is False
    assert visitor.get("/?token=wrong", follow_redirects=False).status_code == 403
    answer = visitor.get(f"/?token={TOKEN}", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie and "rlhf_jax_8000=secret" in cookie
    assert visitor.get("/api/info").json()["authorized"] is True
    assert visitor.post("/api/vote", json={"id": "0"}).status_code == 400


@pytest.mark.parametrize(
    ("status", "request_"),
    [
        (413, {"json": {"prompt": "a" * server.BODY}}),
        (413, {"content": iter([b"[" * 1000] * 100), "headers": {"content-type": "application/json"}}),  # no length
        (415, {"content": b"{}"}),
        (400, {"content": b"{", "headers": {"content-type": "application/json"}}),
        (400, {"content": b"[" * 5000, "headers": {"content-type": "application/json"}}),
        (400, {"content": b'{"prompt": NaN}', "headers": {"content-type": "application/json"}}),
        (400, {"content": b'{"prompt": "\\ud800"}', "headers": {"content-type": "application/json"}}),
        (400, {"json": [1]}),
        (400, {"json": {"prompt": 1}}),
        (400, {"json": {"promt": "a"}}),
        (400, {"json": {"settings": {"temperature": -1.0}}}),
        (400, {"json": {"settings": {"temperature": 10**300}}}),
        (400, {"json": {"settings": {"temperature": 10**400}}}),
        (400, {"json": {"settings": {"top_p": 0.0}}}),
        (400, {"json": {"settings": {"seed": 2**32}}}),
        (400, {"json": {"settings": {"max_tokens": "all"}}}),
        (400, {"json": {"prompt": "a", "forced": [29]}}),
        (400, {"json": {"prompt": "a", "forced": [True]}}),
    ],
    ids=lambda value: str(value)[:30],  # without an iterator's address
)
def test_a_bad_body_is_refused_in_one_line(status, request_, client):
    response = client.post("/api/generate", **request_)
    assert response.status_code == status
    assert "\n" not in response.json()["error"] and len(response.json()["error"]) <= server.MESSAGE + 3


def test_a_field_is_named(client):
    response = client.post("/api/generate", json={"prompt": "a", "settings": {"temperature": -1}})
    assert response.json() == {"error": "temperature: expected at least 0 and at most 100, got -1.0"}


def test_methods_and_routes_are_fixed(client):
    assert client.get("/api/generate").status_code == client.post("/api/info").status_code == 405
    assert client.post("/api/no").status_code == 404
    assert client.post("/v1/chat/completions", json={}).json()["error"]["type"] == "invalid_request_error"


# What it sends


def test_info_and_examples(client, run):
    about = client.get("/api/info").json()
    assert about["trace"] and about["authorized"]
    sides = [{"stage": "sft", "name": "fine-tuned"}, {"stage": "ppo", "name": "RLHF"}]
    assert (about["run"]["sides"], about["run"]["reward"], about["run"]["missing"]) == (sides, "learned", "")
    assert client.get("/api/examples").json() == {"prompts": ["Sam is sad", "TL/DR:"]}


def test_two_policies_side_by_side(client, run):
    """Texts, log-probs and scores are those of the library: the log-probs of a teacher-forced rescoring (<= 1e-3)."""
    first, tokens, end = write(client)
    assert (first["prompt"], first["note"], first["tokens"], first["max_tokens"]) == ("Sam is sad", "", 10, 9)
    models = [run.model, run.model.with_policy(run.policy("ppo"))]
    prompt = run.model.tokenizer.encode("Sam is sad")
    for b, (model, last) in enumerate(zip(models, end["rows"], strict=True)):
        assert last["text"] == model.generate("Sam is sad", seed=3)[0]
        rows = [token["rows"][b] for token in tokens if token["rows"][b]]
        ids = [row["id"] for row in rows]
        for m, reader in enumerate(models):
            (logp_R,) = reader.logprob_tokens([prompt], [ids], 1.0)
            np.testing.assert_allclose([row["logp"][m] for row in rows], logp_R, atol=1e-3)
        assert last["score"] == pytest.approx(run.model.score_tokens([prompt + ids])[0], abs=1e-4)
        assert last["log_ratio"] == pytest.approx(sum(row["logp"][1] - row["logp"][0] for row in rows), abs=1e-3)
        assert last["tokens"] == len(ids) and last["ended"] == (ids[-1] == run.model.tokenizer.eos_id)
        for row in rows:
            assert row["kl"] >= 0 and [len(best) for best in row["best"]] == [8, 8]
            assert all(best == sorted(best, key=lambda c: -c["logp"]) for best in row["best"])


def test_equal_weights_and_shared_noise_give_equal_texts(client, run, monkeypatch):
    monkeypatch.setitem(run._policies, "ppo", run.model.params)
    _, tokens, end = write(client)
    assert end["rows"][0] == end["rows"][1] and end["rows"][0]["log_ratio"] == 0
    assert all(token["rows"][0] == token["rows"][1] for token in tokens)


def test_a_fork_goes_on_from_the_chosen_token(client):
    _, tokens, _ = write(client)
    ids = [token["rows"][1]["id"] for token in tokens[:2]]
    other = next(c["id"] for c in tokens[2]["rows"][1]["best"][0] if c["id"] != tokens[2]["rows"][1]["id"])
    _, forked, _ = write(client, forced=[*ids, other])
    for b in 0, 1:
        assert [token["rows"][b]["id"] for token in forked[:3]] == [*ids, other]
        assert [token["rows"][b]["forced"] for token in forked[:4]] == [True] * 3 + [False]
    assert forked[1]["rows"][0]["logp"] == pytest.approx(tokens[1]["rows"][1]["logp"], abs=1e-4)


def test_limits_are_kept_and_said(client):
    first, tokens, _ = write(client, settings={"max_tokens": 10**9, "temperature": 0})
    assert first["max_tokens"] == 20 >= len(tokens)  # half of the context
    first, _, _ = write(client, prompt="e" * 50)
    assert (first["tokens"], first["note"]) == (31, "the prompt has 50 tokens and was cut to 31")
    write(client, prompt="a\x00\u202e<img src=x onerror=alert(1)>\U0001f600")
    write(client, prompt="")


def test_a_summary_is_of_the_post_as_the_recipe_cuts_it(client):
    first, _, end = write(client, title="Sad", post="Sam is sad", recipe=True, reference="a sad man", prompt="")
    assert (
        first["prompt"].endswith(": Sam is sad\n\nTL/DR:".replace("/", first["prompt"][-4])) and first["tokens"] == 31
    )
    assert first["note"].endswith("was cut to 31") and set(end["rows"][0]["rouge"]) == {"rouge1", "rouge2", "rougeL"}


def longer(run, monkeypatch, context, **changes):
    """Gives the run another context and config."""
    config = dataclasses.replace(run.model.config, context=context)
    monkeypatch.setitem(run.__dict__, "model", dataclasses.replace(run.model, config=config))
    monkeypatch.setattr(run, "config", support.changed(run.config, **changes))


def test_a_long_query_loses_the_end_of_its_post(run, monkeypatch):
    """As in training with data.cut = newline; outside the recipe so that the completion has room."""
    text = tldr.format_query("a", "sad", "Sam is sad\n" * 20)
    longer(run, monkeypatch, 100, data={"prompt_length": 80, "cut": "newline"})
    for recipe, limit in (True, 80), (False, 100 - 9):
        prompt = run.prompt(text, recipe=recipe)
        assert prompt.ids == tldr.fit(text, run.model.tokenizer, limit)[0] and len(prompt.ids) <= limit
        assert prompt.note == f"the prompt has {len(text)} tokens and was cut to {len(prompt.ids)}"


def test_a_beginning_stands_after_eos(run, monkeypatch):
    longer(run, monkeypatch, 40, task="write")
    eos_id, encode = run.model.tokenizer.eos_id, run.model.tokenizer.encode
    assert run.prompt("", recipe=False).ids == [eos_id]
    assert run.prompt("Sam", recipe=True).ids == [eos_id, *encode("Sam")]
    assert run.prompt("Sad" * 10, recipe=False).ids == [eos_id, *encode("SadSad" + "Sad" * 5)[-20:]]


def test_a_reward_of_texts_gives_scores_and_words(run, monkeypatch):
    prompt, ends = playground.Prompt("a", [1]), [{"text": "a sad man"}, {"text": "happy"}]
    longer(run, monkeypatch, 40, reward={"kind": "sentiment"})
    sad, happy = run.scores([[1], [2]], prompt, ends)
    assert sad["score"] == sad["vader"] == pytest.approx(-0.4767) and happy["score"] > 0.5
    assert sad["words"] == [{"start": 2, "end": 5, "own": -2.1, "counted": -2.1}]
    longer(run, monkeypatch, 40, reward={"kind": "gold"})
    assert run.scores([[1], [2]], prompt, ends)[0]["no_score"].startswith(
        "reward gold: InputError: gold: expected rows"
    )


def written(monkeypatch, *texts):
    """Lets the two policies write these texts."""
    rows = [{"text": text, "score": 0.5} for text in texts]
    monkeypatch.setattr(Run, "compare", lambda *_: iter([{"event": "end", "rows": rows}]))


def duel(client, prompt="Sam"):
    return client.post("/api/duel", json={"prompt": prompt, "recipe": True}).json()


def test_votes_are_preference_rows(client, run, tmp_path, monkeypatch):
    """Blind, in a random order, one a pair; and a reward model learns from them."""
    (run.workdir / playground.VOTES).unlink(missing_ok=True)
    stages, rows = set(), []
    for i, letter in enumerate("abcdehimnrst" * 2):
        written(monkeypatch, f"sad {letter}", f"a {letter}")
        pair = duel(client, prompt := f"Sam is sad: {letter}{i}")
        assert set(pair) == {"id", "texts", "note"} and sorted(pair["texts"]) == [f"a {letter}", f"sad {letter}"]
        answer = client.post("/api/vote", json={"id": pair["id"], "choice": i % 2}).json()
        assert [row["text"] for row in answer["rows"]] == pair["texts"] and answer["votes"] == i + 1
        assert client.post("/api/vote", json={"id": pair["id"], "choice": i % 2}).status_code == 400
        stages.add(answer["rows"][0]["stage"])
        rows.append((prompt, pair["texts"][i % 2], pair["texts"][1 - i % 2]))
    assert stages == {"sft", "ppo"}
    path = str(run.workdir / playground.VOTES)
    sizes = {"prompt_length": 31, "response_length": 9, "cut": "left", "held_out": 0.3}
    labels = [{"prompt": prompt, "label": chosen} for prompt, chosen, _ in rows]  # its references
    sft = support.write_rows(tmp_path / "sft.jsonl", labels)
    task = Prompts(sources.Config(source="files", sft=sft, preferences=path, **sizes), seed=1)
    train, held_out, _ = task.rows("preferences")
    read = [(row["prompt"], row["chosen"], row["rejected"]) for row in [*train, *held_out]]
    assert sorted(read) == sorted(rows)
    evaluation = configs.Evaluation(temperature=1.0, samples=0)
    setup = Setup(1, task, run.model.tokenizer, run.model.apply, evaluation)
    section = configs.Reward(steps=1, batch=8, eval_every=0)
    stage = reward_model("reward", setup, section, jax.tree.map(np.array, run.model.params))
    assert np.isfinite(stage.step(stage.state, stage.batch_at(0)).numbers["loss"])


@pytest.mark.parametrize(
    ("texts", "choice", "message"),
    [
        (("sad", "sad"), 0, "choice: expected -1, as the two texts are the same"),
        (("sad", " "), 0, ": expected a text, got an empty one, which data.preferences refuses"),
        (("sad sad sad", "sad"), 0, "expected chosen and rejected of less than 9 tokens"),  # it was cut
        (("sad", "a"), 2, "choice: expected 0, 1, or -1 for none, got 2"),
    ],
)
def test_a_vote_that_training_would_not_read_is_refused(texts, choice, message, client, run, monkeypatch):
    path = run.workdir / playground.VOTES
    before = path.read_bytes() if path.exists() else b""
    written(monkeypatch, *texts)
    pair = duel(client)
    answer = client.post("/api/vote", json={"id": pair["id"], "choice": choice})
    assert answer.status_code == 400 and message in answer.json()["error"]
    seen = client.post("/api/vote", json={"id": pair["id"], "choice": -1}).json()  # looking is allowed
    assert [row["text"] for row in seen["rows"]] == pair["texts"] and seen["saved"] == ""
    assert (path.read_bytes() if path.exists() else b"") == before


def test_a_line_is_appended_after_one_that_was_cut_short(run):
    (run.workdir / "lines.jsonl").write_bytes(b'{"a": 1}\n{"a"')
    run.workdir.append_line("lines.jsonl", {"a": 2})
    run.workdir.append_line("lines.jsonl", {"a": "é\n"})
    assert (run.workdir / "lines.jsonl").read_bytes() == b'{"a": 1}\n{"a"\n{"a": 2}\n{"a": "\\u00e9\\n"}\n'


# One job at a time


def in_a_loop(main):
    """Runs it in a thread: Playwright may have a loop in this one."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(lambda: asyncio.run(main())).result()


def test_jobs_wait_in_order_and_too_many_are_refused():
    async def main():
        jobs, release, started = server.Jobs(waiting=1), threading.Event(), []

        def job(name):
            started.append(name)
            release.wait()
            yield name

        first, second = jobs.start(lambda: job(1)), jobs.start(lambda: job(2))
        with pytest.raises(server.Busy):
            jobs.start(lambda: job(3))
        release.set()
        assert [item async for item in first] + [item async for item in second] == [1, 2]
        await asyncio.sleep(0.05)
        assert started == [1, 2] and [item async for item in jobs.start(lambda: job(4))] == [4]
        stopped = jobs.start(lambda: iter(range(10**9)))
        async for _ in stopped:
            stopped.stop()
            break
        assert [item async for item in jobs.start(lambda: job(5))] == [5]  # its turn comes
        failed = jobs.start(lambda: iter([1 / 0]))
        with pytest.raises(ZeroDivisionError):
            [item async for item in failed]

    in_a_loop(main)


def test_too_many_requests_are_an_error_that_says_so(client, monkeypatch):
    monkeypatch.setattr(server.Jobs, "start", lambda *_: (_ for _ in ()).throw(server.Busy))
    response = client.post("/api/generate", json=PROMPT)
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")


def test_a_client_that_leaves_ends_its_job(served, run, monkeypatch):
    """At the next token: here the client leaves after the first chunk."""
    written, left = [], threading.Event()

    def slow(self, *args, **kwargs):
        for i in range(1000):
            written.append(i)
            yield {"event": "token", "place": i, "rows": []}
            left.wait(0.01)

    monkeypatch.setattr(playground.Run, "compare", slow)
    body = json.dumps(PROMPT).encode()
    headers = {"host": "127.0.0.1:8000", "authorization": f"Bearer {TOKEN}", "content-type": "application/json"}
    scope = {
        "type": "http", "method": "POST", "path": "/api/generate", "raw_path": b"/api/generate", "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()], "scheme": "http",
        "server": ("127.0.0.1", 8000), "client": ("127.0.0.1", 1), "http_version": "1.1",
        "asgi": {"spec_version": "2.3"},
    }  # fmt: skip

    async def main():
        gone, messages = asyncio.Event(), iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive():
            if message := next(messages, None):
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            if message["type"] == "http.response.body":
                gone.set()

        await served(scope, receive, send)
        count = len(written)
        await asyncio.sleep(0.1)
        assert len(written) <= count + 1 < 100

    in_a_loop(main)


# Without weights, without a run


def test_without_weights_it_says_which_command_makes_them(run, static, tmp_path):
    (tmp_path / "config.json").write_bytes((run.workdir / "config.json").read_bytes())
    alone = Run(tmp_path)
    from starlette.testclient import TestClient

    headers = {"Authorization": f"Bearer {TOKEN}"}
    client = TestClient(server.app(alone, token=TOKEN, static=static), base_url=ADDRESS, headers=headers)
    about = client.get("/api/info").json()
    command = f"python experiments/ppo_summarize.py --config=configs/ppo_summarize.py --workdir={tmp_path}"
    assert about["run"]["missing"].endswith(command) and not about["trace"]
    for response in client.post("/api/generate", json=PROMPT), client.get("/api/examples"):
        assert (response.status_code, response.json()) == (404, {"error": about["run"]["missing"]})
    assert client.get("/v1/models").json()["error"]["message"] == about["run"]["missing"]
    assert client.get("/trace/manifest.json").json() == {"error": "no trace; --config.trace.every=10 records one"}
    empty = TestClient(server.app(None, token=TOKEN, static=static), base_url=ADDRESS, headers=headers)
    assert empty.get("/api/info").json()["run"] is None
    assert empty.post("/api/generate", json=PROMPT).status_code == 404


def test_a_folder_without_a_run_is_named(tmp_path):
    assert support.error(Run, tmp_path).startswith(f"workdir: {tmp_path}/config.json: expected the config of a run")


def test_a_port_that_is_taken_is_named():
    with server.listen(0) as first:
        port = first.getsockname()[1]
        first.listen()
        assert first.getsockname()[0] == "127.0.0.1"
        assert support.error(server.listen, port).startswith(f"port: {port} cannot be used (")
    assert support.error(server.listen, 70000) == "port: expected 0 to 65535, got 70000"
    assert isinstance(first, socket.socket)


def test_a_run_on_conversations_reads_a_text_as_the_users_message(run, tmp_path):
    """Through the chat template, as in training; and its votes are rows of messages."""
    folder = tmp_path / "chats"
    shutil.copytree(run.workdir.path, folder)
    template = "{% for m in messages %}{{ m.content }}.{% endfor %}"
    dataclasses.replace(text.load(folder / "text"), template=template).save(folder / "text")
    rows = [
        {"messages": [{"role": "user", "content": f"Sam {c}"}, {"role": "assistant", "content": "a"}]} for c in "abcd"
    ]
    config = json.loads((folder / "config.json").read_text())
    config["data"] |= {"source": "files", "held_out": 0.5, "sft": support.write_rows(tmp_path / "sft.jsonl", rows)}
    (folder / "config.json").write_text(json.dumps(config))
    here = playground.Run(folder)
    encode = here.model.tokenizer.encode
    assert here.chat and not run.chat
    for recipe in True, False:
        assert here.prompt("Sam is sad", recipe=recipe) == playground.Prompt("Sam is sad", encode("Sam is sad."))
    long = here.prompt("Sad" * 20, recipe=True)
    assert (long.text, long.ids) == ("Sad" * 20, encode("Sad" * 20 + ".")[-31:])
    sides = [{"text": "sad", "stage": "sft"}, {"text": "red", "stage": "ppo"}]
    vote = here._preference({"prompt": "Sam", "rows": sides, "how": playground.Settings()}, 1)
    assert vote["prompt"] == [{"role": "user", "content": "Sam"}] and vote["chosen_stage"] == "ppo"
    read = chats.row(vote, sources.COLUMNS["preferences"])
    assert (read["prompt"], read["chosen"], read["rejected"]) == ("Sam", "red", "sad")
