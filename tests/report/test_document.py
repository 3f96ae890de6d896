"""Reading a run's folder, its frontier, what is missing, and what must not be told."""

from __future__ import annotations

import json
import shlex
import shutil

import pytest

from abliterate.common.errors import AbliterateError
from abliterate.common.names import public, public_source
from abliterate.report.document import load_run
from abliterate.report.repeat import repeat_command
from abliterate.settings.run import RunSettings


def changed(folder, change):
    results = json.loads((folder / "results.json").read_text())
    change(results)
    (folder / "results.json").write_text(json.dumps(results))
    return load_run(folder)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/ann/models/fox", "fox"),
        ("read /home/ann/x.csv: 3 repeats left out", "read x.csv: 3 repeats left out"),
        ("prompt file '~/secret dir/x.csv'", "prompt file 'secret dir/x.csv'"),
        (r"C:\Users\ann\x.csv", "x.csv"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("3 of 4 and/or 1/2", "3 of 4 and/or 1/2"),
    ],
)
def test_public_text(text, expected):
    assert public(text) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("/home/ann/fox", "fox"),
        ("./fox/", "fox"),
        ("~/models/fox.gguf", "fox.gguf"),
        ("models/ann/fox", "fox"),
        ("bundled:test", "bundled:test"),
        (r"C:\models\fox", "fox"),
    ],
)
def test_public_source(source, expected):
    assert public_source(source) == expected


def test_candidates_stand_in_for_a_frontier(done):
    loaded = load_run(done)
    assert not loaded.has_frontier
    decoded = [c for c in loaded.results.candidates if c.refusal]
    assert [p.divergence for p in loaded.points] == [c.divergence for c in decoded]
    assert sum(p.chosen for p in loaded.points) == 1
    assert {s.side for s in loaded.strengths} == {"embedding", "attention", "mlp"}


def test_frontier_with_its_strengths(frontier):
    loaded = load_run(frontier)
    assert loaded.has_frontier
    assert [p.divergence for p in loaded.points] == pytest.approx([0.01, 0.03, 0.09, 0.27])
    assert [p.chosen for p in loaded.points] == [False, False, True, False]  # its recipe is recipe.safetensors
    assert loaded.points[2].strengths == loaded.strengths
    assert loaded.points[0].strengths[0].largest == pytest.approx(0.25)
    assert loaded.directions == 4
    assert list(loaded.results.states) == ["original", "edited", "healed"]


def test_a_frontier_reads_no_file_outside_the_folder(copy, done):
    shutil.copy(done / "recipe.safetensors", copy.parent / "outside.safetensors")

    def outside(results):
        entry = {"refusal": results["edited"]["refusal"], "divergence": 0.1, "recipe": "../outside.safetensors"}
        results["frontier"] = [entry]

    assert changed(copy, outside).points[0].strengths is None


def test_strengths_may_stand_in_the_results(copy):
    def named(results):
        results["frontier"] = [
            {
                "refusal": results["edited"]["refusal"], "divergence": 0.1,
                "strengths": {"model.layers.2.mlp.down_proj.weight": 0.5},
            }
        ]  # fmt: skip

    everywhere = changed(copy, named).points[0].strengths
    assert len(everywhere) == 9
    (found,) = [writer for writer in everywhere if writer.strengths]
    assert (found.layer, found.side, found.strengths) == (2, "mlp", (0.5,))


def test_a_damaged_recipe_of_the_frontier_is_told(copy):
    (copy / "broken.safetensors").write_bytes(b"not one")

    def broken(results):
        results["frontier"] = [
            {"refusal": results["edited"]["refusal"], "divergence": 0.1, "recipe": "broken.safetensors"}
        ]

    loaded = changed(copy, broken)
    assert any("point 1" in text and "rule 1" in text for text in loaded.missing)


def test_without_data_it_says_so(copy):
    (copy / "report-data.json").unlink()
    loaded = load_run(copy)
    assert "no report-data.json" in loaded.missing[0]
    assert loaded.strengths[1].layer == 0  # read off the name


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("results.json", "{", "can't be read as JSON"),
        ("results.json", "[]", "no JSON object"),
        ("results.json", "{}", "holds no measurement"),
        ("report-data.json", '{"schema": 99}', "schema 99"),
    ],
)
def test_damage_is_named(copy, name, text, expected):
    (copy / name).write_text(text)
    with pytest.raises(AbliterateError, match=expected):
        load_run(copy)


def test_no_run_there(tmp_path):
    with pytest.raises(AbliterateError, match=r"holds no results\.json"):
        load_run(tmp_path / "nothing")


def parsed(command: str, monkeypatch) -> tuple[str, RunSettings]:
    """The model and the settings that a command line gives, variables and all."""
    import abliterate.commands.run as module
    from command import succeeds

    seen = {}
    monkeypatch.setattr(module, "_run", lambda source, _out, settings, *_rest: seen.update(at=(source, settings)))
    words = shlex.split(command)
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        monkeypatch.setenv(name, value)
    assert words.pop(0) == "abliterate"
    succeeds(*words)
    return seen["at"]


def test_the_command_repeats_the_settings(done, monkeypatch, tiny_folder):
    loaded = load_run(done)
    source, settings = parsed(repeat_command(loaded), monkeypatch)
    assert settings.model_dump() == loaded.results.settings.model_dump(exclude_unset=True)
    assert source == tiny_folder.name


def test_the_command_repeats_unusual_settings(copy, monkeypatch):
    given = {
        "seed": 7, "force": True, "load": {"system_prompt": "Don't \"worry\"", "dtype": "float32"},
        "collect": {"filter": False, "winsorise": 0.995, "projected": True, "batch_size": 5},
        "measure": {"max_new_tokens": 12, "batch_size": 3}, "search": {"layers": "1-2", "max_refusal_rate": 0.1},
        "prompts": {"target": "bundled"},
    }  # fmt: skip
    settings = RunSettings.model_validate(given).model_dump()
    loaded = changed(copy, lambda results: results.update(settings=settings))
    assert parsed(repeat_command(loaded), monkeypatch)[1].model_dump() == settings


def test_the_command_names_no_folder(copy):
    def local(results):
        results["model"]["source"] = "/home/ann/models/fox"
        results["settings"]["prompts"]["target"] = "/home/ann/bad.csv:text"
        results["settings"]["measure"]["judge"] = "classifier:/home/ann/judge:REFUSED"

    command = repeat_command(changed(copy, local))
    assert command.startswith("abliterate run fox --target bad.csv:text")
    assert "--judge classifier:judge:REFUSED" in command
    assert "ann" not in command


def test_the_command_names_an_endpoint_whole_and_each_of_several_judges(copy):
    judge = "llm:http://127.0.0.1:8080/v1:org/model"
    several = {"judge": f"lexical + classifier:/home/ann/judge:NO + {judge}", "report_judge": judge}
    command = repeat_command(changed(copy, lambda results: results["settings"]["measure"].update(several)))
    assert f"--judge 'lexical + classifier:judge:NO + {judge}' " in command and f"--report-judge {judge}" in command
