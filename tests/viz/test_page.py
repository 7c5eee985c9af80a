"""The page as a reader meets it, in Chromium: its numbers are the file's, it proves them, and it can be used by all."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest

from rlhf_jax.viz import export, trace

DEMO = trace.Trace(export.demo_folder())
NAMES = DEMO.names("ppo", "iter")
LAST = DEMO.read(NAMES[-1])
SECTIONS = ("map", "tokens", "kl", "gae", "ratio", "clip", "algorithms", "curves", "samples", "reward", "pairs", "sft")


def number(text):
    """A number of the page, which writes a minus sign."""
    return float(text.replace("−", "-"))


def close(shown, true):
    """Whether a number with about three digits is the true one."""
    return abs(number(shown) - true) <= max(0.006 * abs(true), 0.0006)


def column(page, view, head):
    """The numbers of a column of a view's table of tokens."""
    heads = page.eval_on_selector_all(f"#{view} table thead th", "all => all.map((e) => e.textContent)")
    place = heads.index(head) + 1
    return page.eval_on_selector_all(f"#{view} tbody tr > :nth-child({place})", "all => all.map((e) => e.textContent)")


def untrue(text):
    """(equalities of two numbers in formulas, those that do not hold within the rounding of their digits)."""
    text = re.sub(r"\n\s+=", " =", text).translate(str.maketrans("−×", "-*")).replace("log σ", "logsigmoid")
    names = {"exp": math.exp, "max": max, "logsigmoid": lambda x: -math.log1p(math.exp(-x)), "__builtins__": {}}
    count, wrong = 0, []
    for line in text.splitlines():
        parts = [re.sub(r"\s{3,}.*$", "", part.strip()).replace("loss + ", "") for part in line.split("=")]
        values = []
        for part in parts:
            try:
                values.append(float(eval(part, names)))
            except (SyntaxError, NameError, TypeError):  # in words
                continue
        count += max(len(values) - 1, 0)
        if values and max(abs(value - values[-1]) for value in values) > 0.02 * max(1, *map(abs, values)):
            wrong.append(line)
    return count, wrong


def formulas(page):
    page.wait_for_timeout(200)  # views out of sight follow
    return "\n".join(page.locator(".eq:visible").all_inner_texts())


def slide(page, selector, value):
    """Moves a slider, as an input event."""
    page.eval_on_selector(
        selector, "(e, v) => { e.value = v; e.dispatchEvent(new Event('input', { bubbles: true })); }", str(value)
    )
    page.wait_for_timeout(200)  # views out of sight follow


def served(file):
    """{name: body} of a changed file, and of a manifest with its sha256."""
    data = trace.encode(file)
    manifest = DEMO.manifest | {"files": DEMO.manifest["files"] | {file.name: trace.about(file, data)}}
    return {f"trace/{file.name}": data, "trace/manifest.json": json.dumps(manifest)}


def changed(name, index, by):
    array = np.array(LAST.arrays[name])
    array.reshape(-1)[index] += by
    return dataclasses.replace(LAST, arrays=LAST.arrays | {name: array})


def test_it_says_that_the_numbers_are_the_trainers(visit):
    page = visit()
    assert re.fullmatch(r"matches the trainer: \d\d identities, max \|d\| \S+", page.inner_text("#badge"))
    assert page.is_hidden("#banner") and page.is_hidden("#playground")
    painted = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    assert painted < 1000
    for section in SECTIONS:
        assert page.inner_text(f"#{section} h2"), section


def test_cells_are_the_numbers_of_the_file(visit):
    """Of a rollout in the middle of the list, its KL, rewards, values, advantages and losses."""
    page = visit(f"#iter={LAST.step}&rollout=3&token=2")
    page.wait_for_timeout(200)  # views out of sight follow
    row = LAST["look.rows_B"][2]
    n = int(LAST["rollout.mask_BR"][row].sum())

    def of(name):
        return LAST[f"rollout.{name}"][row][:n].astype(float)

    kl = of("logp_BR") - of("logp_ref_BR")
    beta = LAST.numbers["ppo/kl_coef"]
    for view, head, expected in (
        ("kl", "KL, nats", kl),
        ("kl", "−β KL", -beta * kl),
        ("kl", "reward r", of("rewards_BR")),
        ("gae", "advantage A", of("raw_advantages_BR")),
        ("gae", "whitened", of("advantages_BR")),
    ):
        shown = column(page, view, head)
        assert len(shown) == n and all(map(close, shown, expected)), (view, head)
    place = int(np.flatnonzero(LAST["update.rows_B"][-1].reshape(-1) == row)[0])
    loss = LAST["update.policy_loss_BR"][-1].reshape(-1, LAST["rollout.mask_BR"].shape[1])[place][:n]
    assert all(map(close, [text.split()[0] for text in column(page, "clip", "loss")], loss))
    panel = dict(
        zip(page.locator("aside dt").all_inner_texts(), page.locator("aside dd").all_inner_texts(), strict=True)
    )
    assert close(panel["value"], of("values_BR")[1]) and close(panel["return"], of("returns_BR")[1])
    last = column(page, "kl", "score")
    score = LAST["rollout.score_B"][row] if LAST["rollout.eos_B"][row] else -LAST.more["config"]["missing_eos_penalty"]
    assert close(last[-1], score) and not any(last[:-1])


def test_every_place_has_numbers_only(visit):
    """No NaN, undefined or Infinity, in any iteration and on the last token of a rollout beyond those shown; and each
    formula is true. So at each stop of the tour."""
    page = visit()

    def check():
        count, wrong = untrue(formulas(page))
        assert count >= 10 and wrong == []
        assert not re.search("NaN|undefined|Infinity|object Object", page.inner_text("body"))

    for i in range(len(NAMES)):
        places = ((1, 1), (16, 99), (len(LAST["rollout.score_B"]), 2))
        for rollout, token in places if i in (0, len(NAMES) - 1) else places[1:2]:
            step = DEMO.manifest["files"][NAMES[i]]["step"]
            page.goto(page.url.split("#")[0] + f"#iter={step}&rollout={rollout}&token={token}")
            page.wait_for_function("(text) => document.getElementById('iter-is').textContent === text", arg=str(step))
            check()
    page.click("text=Take the tour")
    for stop in ("map", "tokens", "kl", "gae", "ratio", "clip", "algorithms", "curves", "samples", "reward"):
        page.wait_for_selector(f"#{stop}.toured")
        assert page.inner_text("#tour h2").endswith(page.inner_text(f"#{stop} h2").splitlines()[0])
        check()
        page.click("#tour button:text-matches('^(next|end)$')")
    assert page.is_hidden("#tour") and page.evaluate("document.activeElement.textContent").startswith("Take the tour")


def as_run_of(algorithm, more, **arrays):
    """Routes with the last iteration as if another algorithm had recorded it: the page goes by its config."""
    config = {name: value for name, value in LAST.more["config"].items() if name not in ("clip", "lam")}
    file = dataclasses.replace(LAST, more=LAST.more | {"config": config | more}, arrays=LAST.arrays | arrays)
    stages = DEMO.manifest["stages"] | {"ppo": DEMO.manifest["stages"]["ppo"] | {"algorithm": algorithm}}
    routes = served(file)
    manifest = json.loads(routes["trace/manifest.json"]) | {"stages": stages}
    return routes | {"trace/manifest.json": json.dumps(manifest)}


def test_formulas_are_those_of_the_algorithm(visit):
    """GRPO has its KL in the loss; online DPO has no KL penalty, no ratio and no clip: the loss is of a pair."""
    rows = LAST["update.rows_B"]
    mask = LAST["rollout.mask_BR"][rows]
    k1 = np.where(mask, LAST["update.logp_BR"] - LAST["rollout.logp_ref_BR"][rows], 0)
    group = {"group": 4, "baseline": "mean", "scale": "group_std", "kl": "k3", "clip": 0.2, "whiten_advantages": False}
    routes = as_run_of("grpo", group, **{"update.kl_loss_BR": (np.exp(-k1) - 1 + k1).astype(np.float32)})
    page = visit(f"#iter={LAST.step}&rollout=1&token=2", routes=routes)
    count, wrong = untrue(formulas(page))
    assert count >= 6 and wrong == []
    assert "r = 0: the score arrives with the last token" in page.inner_text("#kl .eq")
    assert column(page, "kl", "−β k3 in the loss") and page.locator("#gae .wide tbody tr").count() == 4

    score_QO = LAST["rollout.score_B"].reshape(-1, 2)
    sign_B = np.sign(score_QO - score_QO[:, ::-1]).reshape(-1, 1).astype(np.float32)
    sign_BR = sign_B * LAST["rollout.mask_BR"]
    pairs = {"group": 2, "kl": "off", "beta": 0.1, "loss": "sigmoid", "smoothing": 0.0, "whiten_advantages": False}
    names = ("rollout.raw_advantages_BR", "rollout.advantages_BR")
    routes = as_run_of("online_dpo", pairs, **dict.fromkeys(names, sign_BR))
    page = visit(f"#iter={LAST.step}&rollout=1&token=2", routes=routes)
    count, wrong = untrue(formulas(page))
    assert count >= 4 and wrong == []
    assert page.inner_text("#clip h2").startswith("The loss of a pair") and page.locator("#kl input").count() == 0


def test_a_run_without_rollouts_shows_what_it_has(visit):
    """DPO samples none. Its last step is proved, and the views of rollouts are left out, with the reason."""
    gains = np.array([[-3, -5, -4], [-4, -4, -6]], np.float32)  # log-probs of chosen and rejected
    refs = np.array([[-4, -5, -4], [-4, -5, -5]], np.float32)
    h = gains[0] - refs[0] - gains[1] + refs[1]  # 1, -1, 1
    arrays = {"update.chosen_B": gains[0], "update.rejected_B": gains[1]}
    arrays |= {"batch.chosen_ref_B": refs[0], "batch.rejected_ref_B": refs[1]}
    numbers = {"dpo_loss": np.logaddexp(0, -0.5 * h).mean(), "margin": 0.5 / 3, "accuracy": 2 / 3, "chosen_logp": -4.0}
    numbers = {f"dpo/{name}": float(value) for name, value in numbers.items()}
    config = {"beta": 0.5, "loss": "sigmoid", "smoothing": 0.0}
    file = trace.File("dpo_iter_000001.json.gz", "dpo", "iter", 1, numbers, arrays, {}, [], {"config": config})
    stages = {name: DEMO.manifest["stages"][name] for name in ("sft", "reward")}
    stages["dpo"] = {"algorithm": "dpo", "steps": 1}
    routes = served(file)
    manifest = json.loads(routes["trace/manifest.json"]) | {"stages": stages}
    page = visit(routes=routes | {"trace/manifest.json": json.dumps(manifest)})
    assert page.inner_text("h1") == "What DPO did" and "it samples none" in page.inner_text("#intro")
    assert re.fullmatch(r"matches the trainer: 4 identities, max \|d\| \S+", page.inner_text("#badge"))
    page.wait_for_selector("#loss-curve", state="attached")
    assert page.is_visible("#reward") and page.is_visible("#sft")
    assert page.is_hidden("#tokens") and page.is_hidden("#panel") and page.is_hidden("#iter")
    assert not re.search("NaN|undefined|Infinity|object Object", page.inner_text("body"))


def test_a_slider_is_a_what_if_and_goes_back(visit):
    page = visit()
    before = column(page, "kl", "reward r")
    slide(page, "#kl input[type=range]", 0.5)
    assert page.inner_text("#badge") == "what-if: tokens, values and ratios are frozen from the run"
    kl = [number(text) for text in column(page, "kl", "KL, nats")]
    shown = [number(text) for text in column(page, "kl", "reward r")]
    assert shown[0] == pytest.approx(-0.5 * kl[0], abs=2e-3)
    assert "beta=0.5" in page.url
    page.click("#reset")
    page.wait_for_timeout(200)
    assert column(page, "kl", "reward r") == before and page.inner_text("#badge").startswith("matches the trainer")
    page.click("#gae button:text('TD: λ = 0')")
    page.wait_for_timeout(200)
    assert column(page, "gae", "advantage A") == column(page, "gae", "δ")


DRAG = """async (selector) => {
  const input = document.querySelector(selector), seen = new Set();
  const shown = input.closest("section").querySelector(".eq");
  input.scrollIntoView({ block: "center" });
  await new Promise((done) => setTimeout(done, 300));
  for (let i = 0; i < 60; i++) {
    input.value = Number(input.min) + ((Number(input.max) - Number(input.min)) * i) / 59;
    input.dispatchEvent(new Event("input", { bubbles: true }));
    seen.add(shown.textContent);
    await new Promise(requestAnimationFrame);
  }
  return seen.size;
}"""


def test_a_drag_is_smooth(visit):
    """At least 30 different formulas, each in less than 16 ms of the browser's own time for script, style and layout.

    That time leaves out what other processes take of a shared machine.
    """
    page = visit()
    page.wait_for_timeout(500)
    client = page.context.new_cdp_session(page)
    client.send("Performance.enable", {"timeDomain": "threadTicks"})

    def busy():
        found = {each["name"]: each["value"] for each in client.send("Performance.getMetrics")["metrics"]}
        return sum(found[name] for name in ("ScriptDuration", "LayoutDuration", "RecalcStyleDuration"))

    for view in ("kl", "gae", "clip"):
        began = busy()
        assert page.evaluate(DRAG, f"#{view} input[type=range]") >= 30
        assert 1000 * (busy() - began) / 60 < 16, view


def test_a_breach_is_a_banner_that_names_it(visit):
    index = int(np.flatnonzero(LAST["rollout.mask_BR"])[5])
    page = visit(f"#iter={LAST.step}", routes=served(changed("rollout.rewards_BR", index, 0.25)))
    banner = page.inner_text("#banner")
    assert banner.startswith(
        f"The trace does not hold: {LAST.name}: rollout.rewards_BR: index {index}: rewards: recorded "
    )
    assert page.inner_text("#badge") == "does not match: see the banner"


@pytest.mark.parametrize(
    ("routes", "words"),
    [
        ({"trace/manifest.json": None}, "--config.trace.every=10"),
        ({"trace/manifest.json": "{"}, "manifest.json is damaged: it is not JSON"),
        (
            {"trace/manifest.json": json.dumps(DEMO.manifest | {"schema": 9})},
            "expected a trace of schema version 1, got 9",
        ),
        ({f"trace/{LAST.name}": b"\x1f\x8b123"}, f"{LAST.name}: damaged: sha256 "),
        ({f"trace/{LAST.name}": None}, f"{LAST.name}: missing, but manifest.json lists it."),
    ],
)
def test_a_trace_that_cannot_be_read_is_said(routes, words, visit):
    visit.seen.expected = ("404",)
    page = visit(f"#iter={LAST.step}", routes=routes, ready=False)
    assert words in page.inner_text("#banner")
    if f"trace/{LAST.name}" in routes:  # the nearest that can be read is shown
        assert page.inner_text("#map h2") and page.inner_text("#iter-is") == str(_step(-2))


def test_a_file_that_is_damaged_is_said_when_it_is_opened(visit):
    """The page goes on with the others."""
    page = visit(f"#iter={_step(0)}", routes={f"trace/{LAST.name}": b"\x1f\x8b123"})
    slide(page, "#iter", len(NAMES) - 1)
    page.wait_for_selector("#banner:not([hidden])")
    assert page.inner_text("#banner").startswith(f"{LAST.name}: damaged: sha256 ")
    slide(page, "#iter", 1)
    page.wait_for_function("(text) => document.getElementById('iter-is').textContent === text", arg=str(_step(1)))
    assert page.is_hidden("#banner")


def test_hostile_tokens_are_inert_and_can_be_seen(visit):
    row = LAST["look.rows_B"][0]
    ids = list(dict.fromkeys(LAST["rollout.response_BR"][row][LAST["rollout.mask_BR"][row] == 1].tolist()))
    texts = ("<img src=x onerror=alert(1)>", "\u202eabc", "\udce2", "a\u0000b")
    strings = LAST.strings | dict(zip(ids, texts, strict=False))
    page = visit(f"#iter={LAST.step}&rollout=1", routes=served(dataclasses.replace(LAST, strings=strings)))
    shown = page.locator("#tokens .strip .token").all_inner_texts()
    assert {"<img src=x onerror=alert(1)>", "\\u{202e}abc", "\\xe2", "a\\u{0}b"} <= {*shown}
    assert page.locator("img").count() == 0


def test_the_loss_of_a_pair_falls_with_its_margin(visit):
    """The curve of -log sigmoid(margin) is the right way up: high at margin -6, low at +6."""
    page = visit()
    page.wait_for_selector("#loss-curve", state="attached")
    points = [
        [float(x) for x in pair] for pair in re.findall(r"([\d.]+) ([\d.]+)", page.get_attribute("#loss-curve", "d"))
    ]
    assert points[0][1] < points[-1][1] - 100  # y grows downwards


def test_the_keyboard_is_enough(visit):
    page = visit(f"#iter={LAST.step}&rollout=1&token=1")
    for key, place in (("ArrowRight", "token=2"), ("]", "rollout=2"), ("[", "rollout=1"), (",", f"iter={_step(-2)}")):
        page.keyboard.press(key)
        page.wait_for_function("(text) => location.hash.includes(text)", arg=place)
    reached = set()
    page.focus(".skip")
    for _ in range(70):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.closest('section, header, aside')?.id ?? ''"))
    assert {"bar", "map", "tokens", "kl", "gae", "ratio", "clip"} <= reached
    page.focus("#tokens .strip .on")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("() => document.activeElement.matches('#tokens .strip .on')")


def _step(place):
    return DEMO.manifest["files"][NAMES[place]]["step"]


def test_the_address_is_the_place(visit):
    page = visit()
    page.select_option("#rollout", "4")
    slide(page, "#token", 3)
    slide(page, "#clip input[type=range]", 0.1)
    again = visit(page.url.split("/")[-1])
    assert again.url == page.url and "rollout=5&token=4&eps=0.1" in page.url
    assert again.inner_text("#badge").startswith("what-if")
    assert column(again, "clip", "loss") == column(page, "clip", "loss")


AXE = """async () => {
  document.querySelectorAll("details").forEach((each) => (each.open = true));
  const found = await axe.run(document, { resultTypes: ["violations"] });
  const places = (each) => each.nodes.slice(0, 3).map((node) => node.target.join(" ")).join(", ");
  return found.violations.map((each) => `${each.id}: ${places(each)}`);
}"""


@pytest.mark.parametrize(("width", "dark"), [(1280, True), (390, False)])
def test_it_is_accessible_and_fits(width, dark, visit, axe):
    """No violation that axe-core finds, and nothing wider than the screen."""
    page = visit(width=width, dark=dark)
    page.wait_for_selector("#pairs .choice")
    page.wait_for_timeout(400)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    tables = page.locator(".scroll:visible")  # that of six columns is stacked where the screen is narrow
    assert tables.count() >= 6
    assert max(tables.evaluate_all("(all) => all.map((each) => each.scrollWidth - each.clientWidth)")) <= 0
    page.evaluate(axe)  # not a script element: the page's policy forbids one
    assert page.evaluate(AXE) == []


def test_a_log_of_unipo_opens(visit, tmp_path):
    """Our own, written in its schema; and one without values and reference, whose views say what they lack."""
    path = export.unipo(export.demo_folder(), tmp_path / "run.json")
    page = visit(f"#iter={_step(0)}&rollout=1&token=1")
    strip = page.locator("#tokens .strip .token").all_inner_texts()
    page.set_input_files("#files input", str(path))
    page.wait_for_function("() => document.getElementById('badge').textContent.startsWith('a log of another trainer')")
    assert page.inner_text("#run") == "run.json"
    log = json.loads(path.read_text())
    slide(page, "#iter", 0)
    page.wait_for_function("() => document.getElementById('iter-is').textContent === '0'")
    page.select_option("#rollout", "0")
    page.wait_for_timeout(300)
    again = page.locator("#tokens .strip .token").all_inner_texts()
    assert again[:-1] == [re.sub(r"\\x..", "\ufffd", text) for text in strip[:-1]]  # their schema has texts, not bytes
    assert "token by token" not in page.inner_text("#banner")
    for entry in log["entries"]:
        for prompt in entry["prompts"]:
            for name in ("ref_log_probs", "values", "returns"):
                del prompt["responses"][0]["tokens"][name]
    path.write_text(json.dumps(log))
    page.set_input_files("#files input", str(path))
    page.wait_for_function("() => document.getElementById('gae').textContent.includes('needs returns, which this run')")
    assert "which this run did not record" in page.inner_text("#kl")
    assert column(page, "clip", "ratio")
    path.write_text("{}")
    page.set_input_files("#files input", str(path))
    page.wait_for_selector("#banner:not([hidden])")
    assert page.inner_text("#banner") == "expected UNIPO's fields header.algorithm and entries"
