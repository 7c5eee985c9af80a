"""The playground in a real browser: it writes, forks, votes, and shows hostile text as text."""

import json

import pytest

from rlhf_jax.viz import playground
from rlhf_jax.viz.playground import Run

HOSTILE = "<img src=x onerror=alert(1)>\u202e\x00\ud83d"


@pytest.fixture
def page(browser, live):
    """The page. At the end: no error on the console, none of the content policy, no request to elsewhere."""
    page, problems = browser.new_page(viewport={"width": 390, "height": 800}), []
    page.set_default_timeout(60_000)

    def note(problem):
        if "status of 400" not in problem:  # a refused request: the page says why
            problems.append(problem)

    page.on("console", lambda message: note(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: problems.append(dialog.message))
    page.on("request", lambda request: request.url.startswith(live.split("?")[0]) or problems.append(request.url))
    page.goto(live)
    page.wait_for_selector("#pg-tab-0")
    yield page
    page.close()
    assert problems == []


def write(page, text):
    page.click("#pg-tab-1")
    panel = page.locator("#pg-panel-1")
    panel.locator("textarea").fill(text)
    panel.locator("button[type=submit]").click()
    panel.locator(".pg-status", has_text="done").wait_for()
    return panel


def tokens(panel, side):
    return panel.locator(".pg-strip").nth(side).locator("button").all_inner_texts()


def test_it_writes_and_forks(page, run, axe):
    panel = write(page, "Sam is sad")
    models = run.model, run.model.with_policy(run.policy("ppo"))
    for side, model in enumerate(models):
        (text,) = model.generate("Sam is sad")
        assert panel.locator(".pg-text").nth(side).inner_text() == (text or "no text")
    strip = panel.locator(".pg-strip").nth(1).locator("button")
    strip.first.focus()
    page.keyboard.press("ArrowRight")  # shows the second token of the second text
    assert panel.locator("h4").inner_text().startswith("Token 2 of the RLHF text")
    candidates = panel.locator("tbody button")
    assert candidates.count() == 16
    first, chosen = tokens(panel, 1)[0], candidates.nth(3).inner_text()
    candidates.nth(3).click()
    panel.locator(".pg-forced").nth(3).wait_for()  # two tokens in both texts
    panel.locator(".pg-status", has_text="done").wait_for()
    assert tokens(panel, 0)[:2] == tokens(panel, 1)[:2] == [first, chosen]
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    strip.first.click()
    page.evaluate(axe)
    for scheme in "light", "dark":
        page.emulate_media(color_scheme=scheme)
        problems = page.evaluate("axe.run('#playground')")["violations"]
        assert [(problem["id"], problem["nodes"][0]["html"]) for problem in problems] == []


def test_an_error_is_shown(page):
    page.click("#pg-tab-1")
    panel = page.locator("#pg-panel-1")
    panel.locator("textarea").fill("\u20ac")
    panel.locator("button[type=submit]").click()
    panel.locator(".pg-status", has_text="text with no known characters").wait_for()


def test_hostile_tokens_are_inert_and_visible(page, monkeypatch):
    token = {"id": 1, "text": HOSTILE, "logp": [-1.0, -2.0], "kl": 0.1, "forced": False}
    token["best"] = [[token | {"logp": -1.0}]] * 2
    end = {"text": HOSTILE, "tokens": 1, "ended": True, "log_ratio": 1.0, "no_score": HOSTILE}
    events = [
        {"event": "token", "place": 0, "rows": [token, token]},
        {"event": "end", "rows": [end, end], "seconds": 1.0},
    ]
    monkeypatch.setattr(Run, "compare", lambda *args, **kwargs: iter(events))
    panel = write(page, "a")
    shown = "<img src=x onerror=alert(1)>\\u{202e}\\u{0}\\u{d83d}"
    assert panel.locator(".pg-text").first.inner_text() == shown
    assert (
        tokens(panel, 0) == [shown.replace(" ", "\u2423")] and shown in panel.locator(".pg-numbers").first.inner_text()
    )
    panel.locator(".pg-strip button").first.click()
    assert page.locator("#playground img").count() == 0


def test_a_vote_is_blind_and_kept(page, run, monkeypatch):
    rows = [{"text": text, "score": score} for text, score in (("sad", 0.25), ("mad", 0.5))]
    monkeypatch.setattr(Run, "compare", lambda *args: iter([{"event": "end", "rows": rows}]))
    page.click("#pg-tab-2")
    panel = page.locator("#pg-panel-2")
    panel.locator("textarea").fill("Sam")
    panel.locator("button[type=submit]").click()
    panel.get_by_text("B is better").wait_for()
    assert "fine-tuned" not in panel.inner_text() and "0.25" not in panel.inner_text()
    texts = panel.locator(".pg-text").all_inner_texts()
    panel.get_by_text("B is better").click()
    panel.get_by_text("Saved in").wait_for()
    assert sorted(panel.locator("h3").all_inner_texts()) in (["A: RLHF", "B: fine-tuned"], ["A: fine-tuned", "B: RLHF"])
    assert panel.get_by_label("seed").input_value() == "1"  # the next two are others
    row = json.loads((run.workdir / playground.VOTES).read_text().splitlines()[-1])
    assert (row["chosen"], row["rejected"]) == (texts[1], texts[0]) and "Sam\n\nTL" in row["prompt"]
