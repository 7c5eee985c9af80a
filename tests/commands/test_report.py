"""The report of a run: complete, in one file, and every text escaped."""

import html.parser
import json

import pytest

from rlhf_jax import config as configs
from rlhf_jax.commands import doctor, report
from tests.support import error

EVIL = '<script>alert(1)</script> ``` | [x](http://example.com) & "q"'
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c63f8cf50cf000003810180a33a4a4c0000000049454e44ae426082"
)


@pytest.fixture
def run(tmp_path):
    """What a run of fine-tuning and PPO leaves; its texts are hostile, and its gains are .1, .5, -.2 and .3."""
    folder = tmp_path / "demo"
    (folder / "evaluation").mkdir(parents=True)
    (folder / "plots").mkdir()
    (folder / "plots" / "pipeline.png").write_bytes(PIXEL)
    (folder / "config.json").write_text(json.dumps(configs.tree(configs.Config())))
    (folder / "about.json").write_text(json.dumps({"command": "python x.py", "data": {"sft": ["data.sft: 3 cut"]}}))
    shared = {"versions": {"jax": "1.2"}, "machine": {"cpus": 2}, "seconds": 10.0}
    numbers = {
        "sft": {"loss": 0.4, "eos_rate": 0.99},
        "ppo": {"gold": 0.7, "gold_sft": 0.5, "gold_gain": 0.2, "gold_ci95": [0.1, 0.3], "win_rate": 0.8, "steps": 2},
    }
    scores = [(0.5, 0.6), (0.0, 0.5), (0.5, 0.3), (0.1, 0.4)]
    samples = [
        {
            "prompt": f"{EVIL} {i}",
            "sft": {"completion": f"before {i}", "gold": first, "score": 0.0},
            "ppo": {"completion": f"after {i}", "gold": last, "score": 9.0},
        }
        for i, (first, last) in enumerate(scores)
    ]
    for name, own in numbers.items():
        (folder / name).mkdir()
        summary = shared | {f"{name}/{key}": value for key, value in own.items()}
        (folder / name / "summary.json").write_text(json.dumps(summary))
        (folder / name / "metrics.jsonl").write_text("")
        (folder / name / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    wins = {"value": 0.8, "ci95": [0.7, 0.9], "length_controlled": {"value": 0.75, "ci95": [0.6, 0.85]}}
    result = {"stage": "ppo", "text": {"rougeL": {"value": 0.25}}, "win_rate": {"against": "sft", "gold": wins}}
    (folder / "evaluation" / "ppo.json").write_text(json.dumps(result))
    (folder / "evaluation" / "ppo-1.jsonl.made_of.json").write_text("{}")
    return folder


class Reader(html.parser.HTMLParser):
    """The tags and attributes of a page, and its texts by the heading above them."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.links, self.texts, self.heading = [], [], {}, ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        if self.lasttag == "h2" and data.strip():
            self.heading, self.lasttag = data, ""
        self.texts.setdefault(self.heading, []).append(data)

    def said(self, heading):
        return " ".join("".join(f"{text} " for text in self.texts[heading]).split())


def test_the_page_has_everything(run):
    page = Reader(report.write(run).read_text())
    assert "ppo before after gain 95% gold 0.5 0.7 0.2 0.1 to 0.3" in page.said("Results")
    assert "sft eos_rate pass 0.99 0.9 or more" in page.said("Checks (doctor)")
    assert "win rate over sft, by value 95% at equal lengths 95% gold 0.8 0.7 to 0.9 0.75 0.6 to 0.85" in page.said(
        "Evaluation of ppo"
    )
    assert page.said("Data") == "Data data.sft: 3 cut"
    assert "--config.ppo.kl_coef 0.05" in page.said("Config") and "--config.rloo.lr" not in page.said("Config")
    assert "command: python x.py" in page.said("Made with") and "jax 1.2" in page.said("Made with")
    assert "ppo win_rate 0.8" in page.said("All numbers")


def test_samples_are_chosen_by_their_gain(run):
    """Of -.2, .1, .3, .5: the median is the third, as there are four."""
    said = Reader(report.write(run).read_text()).said("Samples")
    places = [
        said.index(text) for text in ("best gain, 0.5", "after 1", "median gain, 0.3", "after 3", "worst gain, -0.2")
    ]
    assert places == sorted(places) and "after 0" not in said


def test_the_page_makes_no_request_and_runs_nothing(run):
    text = report.write(run).read_text()
    page = Reader(text)
    assert page.links and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not {"script", "link", "iframe", "a"} & set(page.tags)
    assert "default-src 'none'" in text and EVIL not in text
    assert EVIL in page.said("Samples")


def test_markdown_has_texts_in_fences_that_they_cannot_leave(run):
    report.write(run)
    lines = (run / "report.md").read_text().splitlines()
    start = lines.index(f"{EVIL} 1")
    assert lines[start - 1] == lines[start + 1] == "````"  # one more than in the text
    assert "![the whole run](plots/pipeline.png)" in lines
    assert "| sft | eos\\_rate | pass | 0.99 | 0.9 or more | healthy runs of the configs here |" in lines


def test_what_best_of_n_has_found_is_among_the_checks(run, monkeypatch):
    found = doctor.Finding("reward", "gain in gold", doctor.FAIL, -0.1, "more than 0", "by definition", "more pairs")
    monkeypatch.setattr(doctor, "tried", lambda _: [found])
    said = Reader(report.write(run).read_text()).said("Checks (doctor)")
    assert "reward first: gain in gold is -0.1, expected more than 0" in said and "more pairs" in said


def test_it_is_written_again_only_where_it_is(run):
    assert report.again(run) is None
    assert report.write(run) == run / "report.html"
    (run / "evaluation" / "ppo.json").unlink()
    assert "Evaluation of" not in report.again(run).read_text()


def test_samples_of_one_prompt_have_both_sides_in_a_row():
    rows = [{"sft": "a", "rl": "b", "reward_sft": 0.1, "reward_rl": 0.3}]
    assert report.gains(rows, "rl") == (
        "reward",
        [{"prompt": "", "before": "a", "after": "b", "first": 0.1, "last": 0.3, "gain": pytest.approx(0.2)}],
    )
    assert report.gains([{"prompt": "p", "chosen": "a"}], "reward") == ("", [])


def test_a_damaged_file_is_one_line(run):
    (run / "ppo" / "samples.jsonl").write_text("{")
    assert "samples.jsonl: expected the samples of the stage" in error(report.write, run)


def test_a_run_without_a_finished_stage(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(configs.tree(configs.Config())))
    assert error(report.write, tmp_path).endswith("expected a run with a finished stage; there is none yet")
