"""The charts and the files: their numbers are those measured, they hold everything, and tell nothing they shouldn't."""

from __future__ import annotations

import getpass
import importlib.util
import json
import re
import socket
import sys
from pathlib import Path

import pytest

from abliterate.common.errors import AbliterateError
from abliterate.measure.numbers import Share
from abliterate.measure.rates import Rate
from abliterate.report import headline, load_run, write_html, write_markdown, write_stills
from abliterate.report.figures import all_figures
from abliterate.report.stills import COLOURS
from command import fails, succeeds

CHARTS = {
    "outcome", "strengths", "separation-auc", "separation-silhouette", "separation-cosine", "separation-norm",
    "projection", "cosines", "frontier", "point-strengths", "candidates", "tokens",
}  # fmt: skip


def html(folder, **options) -> str:
    return write_html(folder, folder / "again.html", **options).read_text()


def without_plotly(text: str) -> str:
    return re.sub(r'<script type="text/plain" id="plotly">.*?</script>', "", text, flags=re.DOTALL)


def coloured(value):
    """The figure with real colours, as plotly wants them."""
    if isinstance(value, str):
        return COLOURS.get(value, value)
    if isinstance(value, list):
        return [coloured(v) for v in value]
    return {k: coloured(v) for k, v in value.items()} if isinstance(value, dict) else value


@pytest.fixture
def no_module(monkeypatch):
    """Make a module look as if it weren't installed."""
    find = importlib.util.find_spec

    def hide(name):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setattr(importlib.util, "find_spec", lambda n, *rest: None if n == name else find(n, *rest))

    return hide


# --- charts --------------------------------------------------------------------------------------


def test_every_chart_is_there_and_is_plotlys(frontier):
    import plotly.graph_objects as go

    figures = all_figures(load_run(frontier))
    assert set(figures) == CHARTS
    for figure in figures.values():
        for index in range(max(1, len(figure.frames))):
            data, layout = figure.at(index)
            go.Figure(coloured(data), coloured(layout))  # raises on what plotly doesn't know
        assert figure.summary.endswith((".", ")"))
        assert figure.table.rows


def test_outcome_draws_what_was_measured(frontier):
    loaded = load_run(frontier)
    figure = all_figures(loaded)["outcome"]
    assert [trace["name"] for trace in figure.data] == ["original", "edited", "healed"]
    for trace, (_, measured) in zip(figure.data, loaded.results.states.items(), strict=True):
        rate = measured.refusal
        assert trace["x"][0] == pytest.approx(100 * rate.rate)
        assert trace["x"][0] + trace["error_x"]["array"][0] == pytest.approx(100 * rate.ci95[1])
        assert trace["x"][0] - trace["error_x"]["arrayminus"][0] == pytest.approx(100 * rate.ci95[0])
    assert "healed 2 of 9 = 22.2%" in figure.summary


def test_chosen_place_is_marked(done, place):
    loaded = load_run(done)
    figure = all_figures(loaded)["separation-auc"]
    (marks,) = [trace for trace in figure.data if trace["name"] == "chosen"]
    assert marks["x"] == [place.layer]
    assert marks["y"] == [loaded.data["separation"][place.site]["auc"][place.layer]]
    assert all_figures(loaded)["projection"].shown == place.layer


def test_each_point_of_the_frontier_has_its_strengths(frontier):
    loaded = load_run(frontier)
    figures = all_figures(loaded)
    assert figures["frontier"].picks == "point-strengths"
    assert figures["frontier"].data[0]["y"] == pytest.approx([90, 40, 10, 0])
    assert figures["point-strengths"].shown == 2
    for point, frame in zip(loaded.points, figures["point-strengths"].frames, strict=True):
        drawn = sorted(y for trace in frame.data for y in trace["y"])
        assert drawn == pytest.approx(sorted(s.largest for s in point.strengths))


# --- HTML ----------------------------------------------------------------------------------------


def test_run_writes_it(done):
    assert (done / "report.html").read_text().lstrip().startswith("<!doctype html>")


def test_it_is_small_and_asks_for_nothing(frontier):
    text = html(frontier)
    assert len(text.encode()) < 5_000_000
    rest = without_plotly(text)
    assert not re.search(r"(?:src|href|action|data|poster)\s*=\s*[\"']?(?:https?:|//)", rest)
    assert "@import" not in rest
    assert "url(" not in rest
    assert "default-src 'none'" in rest


def test_it_tells_no_place_host_or_user(done, tiny_folder):
    text = without_plotly(html(done))
    for secret in (
        str(Path.home()),
        str(tiny_folder.parent),
        str(done.parent),
        socket.gethostname(),
        f"/{getpass.getuser()}/",
    ):
        assert secret not in text


def test_sections_answer_in_order(done):
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", html(done))
    assert headings == [
        "Did it work?", "What did it cost?", "What was changed?", "How was it chosen?", "Can I trust it?",
        "How do I repeat it?",
    ]  # fmt: skip


def test_the_first_screen(done):
    """The model's name, a sentence, a verdict for each number, the day, and commands to copy."""
    loaded = load_run(done)
    text = html(done)
    first = text[: text.index("<main>")]
    for tile in headline.tiles(loaded):
        assert tile.numbers in first and tile.verdict in first
    assert [tile.what for tile in headline.tiles(loaded)][-2:] == ["degenerate answers", "divergence"]
    assert f"<h1>{headline.name(loaded)}</h1>" in first and headline.made(loaded) in first
    assert headline.headline(loaded) in first
    lines = [line for _, line in headline.next_steps(loaded)]
    assert f"abliterate export {done.name} --gguf Q4_K_M --ollama" in lines
    assert len(re.findall(r"<code>", first)) == len(lines) == 3


@pytest.mark.parametrize(
    ("was", "now", "wanted", "verdict", "good"),
    [
        ((98, 100), (2, 100), -1, "gone", True),
        ((98, 100), (40, 100), -1, "fewer", True),
        ((98, 100), (95, 100), -1, "no change shown", None),
        ((2, 100), (97, 100), 1, "more", True),
        ((1, 100), (2, 100), 0, "no change shown", True),
        ((1, 100), (30, 100), 0, "more", False),
    ],
)
def test_a_verdict_says_no_more_than_the_intervals(was, now, wanted, verdict, good):
    shares = [Share.model_validate(Rate(*pair).to_json("refused")) for pair in (was, now)]
    tile = headline._share("refusals", *shares, wanted)
    assert (tile.verdict, tile.good) == (verdict, good)
    assert tile.numbers == f"{was[0]} → {now[0]} of 100"


def test_answers_that_loop_or_evade_are_marked(copy):
    data = json.loads((copy / "report-data.json").read_text())
    data["examples"]["baseline"][0]["edited"]["answer"] = "het je " * 40
    data["examples"]["target"][0]["edited"] = {"refused": False, "evaded": True}
    (copy / "report-data.json").write_text(json.dumps(data))
    text = html(copy)
    assert re.search(r'<span class="marked">(not )?refused, loops</span>', text)
    assert '<span class="marked">evaded</span>' in text


def test_numbers_in_the_text(done):
    text = html(done)
    results = json.loads((done / "results.json").read_text())
    rate = results["edited"]["refusal"]
    assert f"{rate['refused']} of {rate['total']} = {rate['rate']:.1%}" in text
    assert f"{results['edited']['divergence']['answer']:.3g}" in text
    assert results["prompts"]["target"]["test"]["sha256"][:12] in text
    assert "--train-prompts 12" in text


def test_a_partial_edit_is_told(frontier):
    assert "what is left need not be small" in html(frontier)


@pytest.mark.slow
def test_answers_to_target_prompts_only_when_asked_twice(shown):
    answers = [
        e["edited"]["answer"] for e in json.loads((shown / "report-data.json").read_text())["examples"]["target"]
    ]
    answers = [a for a in answers if len(a) > 4]
    assert answers

    def held(text: str) -> list[str]:
        from markupsafe import escape

        return [a for a in answers if str(escape(a)) in text or json.dumps(a) in text]

    assert held((shown / "report.html").read_text()) == answers  # the run was told to
    assert held(html(shown, show_completions=True)) == answers
    assert held(html(shown)) == []
    assert held(write_markdown(shown, shown / "again.md").read_text()) == []


def test_asked_but_not_kept_is_said(done):
    text = html(done, show_completions=True)
    assert "This run kept no answers to target prompts" in text


def test_answers_to_baseline_prompts_are_shown(done):
    from markupsafe import escape

    (first, *_) = json.loads((done / "report-data.json").read_text())["examples"]["baseline"]
    text = html(done)
    assert str(escape(first["prompt"])) in text
    assert str(escape(first["original"]["answer"])) in text
    assert str(escape(first["edited"]["answer"])) in text


def test_a_prompt_with_marks_stays_text(copy):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    data = json.loads((copy / "report-data.json").read_text())
    data["examples"]["baseline"][0]["prompt"] = evil
    data["tokens"][0]["prompt"] = data["tokens"][0]["tokens"][0] = evil
    data["projection"]["prompts"]["target"][0] = evil
    (copy / "report-data.json").write_text(json.dumps(data))
    text = html(copy)
    assert "<script>alert" not in text
    assert "<img" not in text
    assert text.count("</script>") == 3


def test_without_report_data(copy):
    (copy / "report-data.json").unlink()
    text = html(copy)
    assert "There is no report-data.json here" in text
    assert set(all_figures(load_run(copy))) == CHARTS - {
        name for name in CHARTS if name.startswith("separation") or name in ("projection", "cosines", "tokens")
    }


def test_what_measure_wrote(copy, done):
    results = json.loads((done / "results.json").read_text())
    document = {key: results[key] for key in ("schema", "original", "settings", "prompts", "environment", "timings_s")}
    document |= {"edited": None, "model": {"source": "fox/fox", "config_hash": "0", "revision": None}}
    file = copy.parent / "only" / "numbers.json"
    file.parent.mkdir()
    file.write_text(json.dumps(document))
    text = write_html(file).read_text()
    assert "The model refuses" in text
    assert "abliterate measure fox/fox" in text
    assert "Nothing was edited" in text


# --- pictures and Markdown -----------------------------------------------------------------------


@pytest.mark.slow
def test_pictures(frontier, tmp_path):
    from PIL import Image

    folder = write_stills(frontier, tmp_path / "pictures")
    assert {file.stem for file in folder.iterdir()} == CHARTS
    for file in folder.iterdir():
        with Image.open(file) as image:
            assert image.width > 900
            assert len(image.convert("RGB").getcolors(2**20)) > 20, f"{file.name} is empty"


@pytest.mark.slow
def test_pictures_are_the_same_twice(frontier, tmp_path):
    first, second = (write_stills(frontier, tmp_path / name) for name in ("first", "second"))
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes()


@pytest.mark.slow
def test_markdown_links_pictures_that_are_there(frontier, tmp_path):
    file = write_markdown(frontier, tmp_path / "report.md")
    text = file.read_text()
    linked = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text)
    assert len(linked) == len(CHARTS) - 1  # the points' strengths want a list to pick from
    assert all((tmp_path / name).is_file() for name in linked)
    assert "| refusals |" in text
    assert "2 of 9 = 22.2%" in text


# --- without the extra ---------------------------------------------------------------------------


def test_a_plain_install_ends_in_a_report():
    """What the page is made with is a core dependency: a run without extras writes report.html."""
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    core = project[project.index("dependencies = [") : project.index("[project.optional-dependencies]")]
    assert '"plotly' in core and '"jinja2' in core


def test_without_matplotlib(no_module, copy):
    no_module("matplotlib")
    with pytest.raises(AbliterateError, match="matplotlib"):
        write_stills(copy)
    text = write_markdown(copy).read_text()
    assert "Pictures are left out" in text
    assert "![" not in text


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_command_writes_beside_the_run(copy):
    for _ in range(2):  # made anew without being told to
        told = succeeds("report", copy, "--json").json
    assert told["format"] == "html"
    assert Path(told["path"]) == copy / "report.html"
    assert told["bytes"] == (copy / "report.html").stat().st_size
    assert succeeds("report", copy, "--format", "png").out.strip() == f"report: {copy / 'report-png'}"
    assert {file.stem for file in (copy / "report-png").iterdir()} == CHARTS


def test_command_keeps_what_is_elsewhere(copy, tmp_path):
    file = tmp_path / "mine.html"
    file.write_text("mine")
    assert "exists" in fails(tmp_path, "report", copy, "--out", file)
    succeeds("report", copy, "--out", file, "--overwrite")
    assert "<!doctype html>" in file.read_text()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--format", "md", "--show-completions"], "is for html"),
        (["--format", "png", "--open"], "pictures are a folder"),
    ],
)
def test_command_refuses_what_makes_no_sense(copy, options, expected):
    assert expected in fails(copy, "report", copy, *options)


def test_command_without_a_run(tmp_path):
    assert "holds no results.json" in fails(tmp_path, "report", tmp_path)


def test_command_opens_it(copy, monkeypatch):
    opened = []
    monkeypatch.setattr("typer.launch", lambda address: opened.append(address))
    succeeds("report", copy, "--open", "--quiet")
    assert opened == [(copy / "report.html").as_uri()]
