"""Judges by hand: a score, a program in another process, and a language model behind HTTP."""

import http.server
import json
import sys
import textwrap
import threading

import numpy as np
import pytest

from rlhf_jax import judges
from tests.support import error

ROWS = [{"prompt": f"post {i}", "n": i} for i in range(4)]
OURS, THEIRS = ["aaa", "b", "cc", "d"], ["a", "bbb", "cc", "ddd"]  # longer, shorter, equal, shorter
LONGER = [1, 0, 0.5, 0]


def program(tmp_path, body):
    """The command line of a judge that has `row`, and must print."""
    path = tmp_path / "judge.py"
    loop = "import json, sys\nfor i, line in enumerate(sys.stdin):\n    row = json.loads(line)\n"
    path.write_text(loop + textwrap.indent(body, "    "))
    return f"{sys.executable} {path}"


LENGTH = """\
a, b = len(row["a"]), len(row["b"])
print(json.dumps({"winner": "tie" if a == b else "a" if a > b else "b"}), flush=True)"""


def command(line, tmp_path, **parts):
    return judges.Command(line, judges.Answers(tmp_path / "answers.jsonl"), **parts)


def test_a_score_decides_and_equal_scores_are_a_tie():
    judge = judges.Scored("length", lambda rows, texts: np.array([len(text) for text in texts], np.float32))
    assert judge.wins(ROWS, OURS, THEIRS).tolist() == LONGER


def test_a_program_reads_rows_and_answers_each(tmp_path):
    line = program(tmp_path, f'assert row["prompt"] == f"post {{row[\'n\']}}"\n{LENGTH}')
    assert command(line, tmp_path).wins(ROWS, OURS, THEIRS).tolist() == LONGER
    assert command(line, tmp_path).wins(ROWS, THEIRS, OURS).tolist() == [0, 1, 0.5, 1]


def test_a_judge_that_always_says_a_wins_half(tmp_path):
    """Sides alternate, so a preference for a place is none for a model."""
    line = program(tmp_path, 'print(json.dumps({"winner": "a"}), flush=True)')
    assert command(line, tmp_path).wins(ROWS, OURS, THEIRS).tolist() == [1, 0, 1, 0]


def test_what_was_answered_is_asked_once(tmp_path):
    line = program(tmp_path, f'open({str(tmp_path / "asked")!r}, "a").write(row["prompt"] + ";")\n{LENGTH}')
    command(line, tmp_path).wins(ROWS[:2], OURS[:2], THEIRS[:2])
    assert command(line, tmp_path).wins(ROWS, OURS, THEIRS).tolist() == LONGER
    assert command(line, tmp_path).wins(ROWS, OURS, THEIRS).tolist() == LONGER
    assert (tmp_path / "asked").read_text() == "post 0;post 1;post 2;post 3;"


def test_a_half_written_answer_is_asked_again(tmp_path):
    line = program(tmp_path, LENGTH)
    command(line, tmp_path).wins(ROWS, OURS, THEIRS)
    path = tmp_path / "answers.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    assert command(line, tmp_path).wins(ROWS, OURS, THEIRS).tolist() == LONGER


def test_damaged_answers_are_named(tmp_path):
    (tmp_path / "answers.jsonl").write_text("[1]\n")
    message = error(judges.Answers, tmp_path / "answers.jsonl")
    assert message.startswith(f"judge: {tmp_path}/answers.jsonl: expected answers, got") and "remove it" in message


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (f"{LENGTH}\nif i == 1: sys.exit(7)", "expected 4 answers, got 2; what is answered is kept (exit code 7)"),
        ('print("A wins")', 'answer 1: expected {"winner": "a", "b" or "tie"}, got \'A wins\''),
        ("print('{\"winner\": 1}')", 'answer 1: expected {"winner": "a", "b" or "tie"}'),
        ("import time; time.sleep(9)", "expected an answer within 0.5 s"),
    ],
)
def test_a_program_that_fails_is_named(body, expected, tmp_path):
    judge = command(program(tmp_path, body), tmp_path, seconds=0.5 if "sleep" in body else 60)
    message = error(judge.wins, ROWS, OURS, THEIRS)
    assert message.startswith(f"judge {judge.line}") and expected in message
    assert len(judge.answers.known) == (2 if "exit" in body else 0)


@pytest.mark.parametrize("line", ["no-such-program --x", "'", ""])
def test_no_program(line, tmp_path):
    assert error(command(line, tmp_path).wins, ROWS, OURS, THEIRS).startswith("judge: expected a")


# Endpoints


@pytest.fixture
def endpoint(tmp_path):
    """endpoint(answer): a judge whose server answers answer(question); `endpoint.seen` has the requests."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, self.headers.get("Authorization"), body))
            answer = self.server.answer(body["messages"][0]["content"])
            self.send_response(200 if answer is not None else 503)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"message": {"content": answer}}]}).encode())

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def make(answer):
        server.answer = answer
        url = f"http://127.0.0.1:{server.server_port}/v1"
        return judges.Endpoint(url, "m", judges.Answers(tmp_path / "answers.jsonl"), seconds=5)

    make.seen = seen
    yield make
    server.shutdown()
    thread.join()
    server.server_close()


def longer(question):
    a, b = (question.split(f"Summary {side}:\n")[1].split("\n")[0] for side in "AB")
    return f'Comparison: one is longer.\nPreferred: "{"A" if len(a) >= len(b) else "B"}"'


def test_both_orders_are_asked_and_a_disagreement_is_a_tie(endpoint, monkeypatch):
    monkeypatch.setenv(judges.KEY, "secret")
    judge = endpoint(longer)
    assert judge.wins(ROWS, OURS, THEIRS).tolist() == LONGER  # of equal texts it always prefers A
    assert judge.counts == {"pairs": 4, "disagreed": 1, "unread": 0}
    path, key, body = endpoint.seen[0]
    assert path == "/v1/chat/completions" and key == "Bearer secret"
    assert body["model"] == "m" and body["temperature"] == 0 and "post 0" in body["messages"][0]["content"]
    assert b"secret" not in judge.answers.path.read_bytes()
    asked = len(endpoint.seen)
    assert endpoint(longer).wins(ROWS, OURS, THEIRS).tolist() == LONGER and len(endpoint.seen) == asked


def test_an_answer_that_cannot_be_read_is_counted(endpoint):
    judge = endpoint(lambda question: "I like both.")
    assert judge.wins(ROWS[:1], OURS[:1], THEIRS[:1]).tolist() == [0.5]
    assert judge.counts == {"pairs": 1, "disagreed": 0, "unread": 2}


def test_an_endpoint_that_fails_is_named_and_answers_are_kept(endpoint):
    judge = endpoint(lambda question: longer(question) if "post 0" in question else None)
    assert error(judge.wins, ROWS, OURS, THEIRS) == (
        f"judge {judge.url}/chat/completions: HTTP 503; what is answered is kept"
    )
    assert len(judges.Answers(judge.answers.path).known) == 2
    away = judges.Endpoint("http://127.0.0.1:9/v1", "m", judge.answers)
    assert error(away.wins, ROWS, OURS, THEIRS).startswith("judge http://127.0.0.1:9/v1/chat/completions: ")
