"""A benchmark of several models: the table, what is remembered, what is said when something is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from abliterate.apply.weights import bake
from abliterate.bench import harness
from abliterate.bench.models import Contestant, contestants, fingerprint
from abliterate.bench.run import BenchOptions, bench
from abliterate.common.errors import AbliterateError, ModelError, OutputError, RecipeError
from abliterate.edit.edit import Edit
from abliterate.edit.recipe import save_recipe
from abliterate.models.recipes import recipe_for
from abliterate.settings.run import LoadSettings
from models import handle_of, save_tiny, tiny_llama, tiny_tokenizer

EDITED = ("model.layers.1.mlp.down_proj.weight", "model.layers.2.self_attn.o_proj.weight")


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, a recipe for the first, the first with it baked in, and an adapter that is the recipe."""
    from abliterate.apply.adapter.form import apply_adapter
    from abliterate.apply.forms import ApplyOptions
    from abliterate.common.reporting import Silent

    folder = tmp_path_factory.mktemp("bench")
    one = tiny_llama(context=1024)
    save_tiny(folder / "one", one)
    save_tiny(folder / "two", tiny_llama(context=1024, seed=1))
    handle = handle_of(one)
    edit = Edit.from_names(dict.fromkeys(EDITED, 1.0), torch.randn(32, generator=torch.Generator().manual_seed(3)))
    recipe = recipe_for(edit, handle)
    save_recipe(recipe, folder / "r.safetensors")
    apply_adapter(recipe, str(folder / "one"), folder / "lora", ApplyOptions(), Silent())
    bake(handle, edit)
    save_tiny(folder / "baked", handle.model)
    return folder


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(model, task) of every evaluation from now on."""
    seen: list[tuple[str, str]] = []
    plain = harness.run_task

    def counted(model: Any, task: Any, **options: Any) -> Any:
        seen.append((Path(model.handle.source).name, task.task_name))
        return plain(model, task, **options)

    monkeypatch.setattr(harness, "run_task", counted)
    return seen


def options(folder: Path, *suite: str, **more: Any) -> BenchOptions:
    return BenchOptions(suite or ("quick_knowledge,quick_arithmetic",), store=folder / "store", **{"limit": 6, **more})


def of(desk: Path, *names: str) -> list[Contestant]:
    return contestants([f"{name}={desk / name}" for name in names])


@pytest.mark.slow
def test_a_second_run_evaluates_nothing_and_finds_the_same(desk: Path, tmp_path: Path, runs: list[Any]) -> None:
    first = bench(of(desk, "one", "two"), tmp_path / "out", options(tmp_path))
    assert len(runs) == 4
    again = bench(of(desk, "one", "two"), tmp_path / "again", options(tmp_path))
    assert len(runs) == 4
    assert again.text == first.text
    assert again.document["rows"] == first.document["rows"]
    assert again.document["evaluated"] == {"one": 0, "two": 0}
    bench(of(desk, "one", "two"), None, options(tmp_path, fresh=True))
    assert len(runs) == 8


@pytest.mark.parametrize(
    "change", [{"limit": 7}, {"chat": True}, {"shots": 2}], ids=["limit", "chat template", "worked examples"]
)
def test_other_settings_are_other_scores(desk: Path, tmp_path: Path, runs: list[Any], change: dict[str, Any]) -> None:
    bench(of(desk, "one"), None, options(tmp_path, "quick_arithmetic", chat=False))
    bench(of(desk, "one"), None, options(tmp_path, "quick_arithmetic", **{"chat": False, **change}))
    before = len(runs)
    bench(of(desk, "one"), None, options(tmp_path, "quick_arithmetic", **{"chat": False, **change}))
    assert before == len(runs) == 2


def test_only_what_is_new_is_run(desk: Path, tmp_path: Path, runs: list[Any]) -> None:
    bench(of(desk, "one"), None, options(tmp_path, "quick_knowledge"))
    bench(of(desk, "one", "two"), None, options(tmp_path))
    assert runs == [
        ("one", "quick_knowledge"), ("one", "quick_arithmetic"),
        ("two", "quick_knowledge"), ("two", "quick_arithmetic"),
    ]  # fmt: skip


def test_what_was_done_before_a_kill_is_kept(
    desk: Path, tmp_path: Path, runs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = harness.run_task

    def killed(model: Any, task: Any, **more: Any) -> Any:
        if (model.handle.source, task.task_name) == (str(desk / "two"), "quick_arithmetic"):
            raise KeyboardInterrupt
        return counted(model, task, **more)

    monkeypatch.setattr(harness, "run_task", killed)
    with pytest.raises(KeyboardInterrupt):
        bench(of(desk, "one", "two"), tmp_path / "out", options(tmp_path))
    assert not (tmp_path / "out").exists()
    assert len(runs) == 3
    monkeypatch.setattr(harness, "run_task", counted)
    bench(of(desk, "one", "two"), tmp_path / "out", options(tmp_path))
    assert runs[3:] == [("two", "quick_arithmetic")]


def test_a_damaged_score_is_run_again(desk: Path, tmp_path: Path, runs: list[Any]) -> None:
    bench(of(desk, "one"), None, options(tmp_path, "quick_knowledge"))
    (file,) = (tmp_path / "store").iterdir()
    file.write_text(file.read_text()[:50])
    bench(of(desk, "one"), None, options(tmp_path, "quick_knowledge"))
    assert len(runs) == 2


@pytest.mark.slow
def test_a_recipe_a_baked_model_and_an_adapter_of_one_edit_score_alike(desk: Path, tmp_path: Path) -> None:
    columns = contestants(
        [f"one={desk / 'one'}", f"baked={desk / 'baked'}", f"lora={desk / 'lora'}"], [f"live={desk / 'r.safetensors'}"]
    )
    found = bench(columns, None, options(tmp_path, "quick_knowledge,quick_common_sense,quick_instructions", limit=40))
    scores = {label: [row["models"][label]["score"] for row in found.document["rows"]] for label in found.table.labels}
    assert scores["live"] == scores["baked"] == scores["lora"] != scores["one"]
    items = found.document["tasks"]["quick_knowledge"]["models"]
    assert items["live"]["items"] == items["baked"]["items"] == items["lora"]["items"]


def test_scores_standard_errors_and_differences_are_those_of_the_items(desk: Path, tmp_path: Path) -> None:
    found = bench(of(desk, "one", "two"), None, options(tmp_path, "quick_knowledge", limit=None))
    (row,) = found.document["rows"]
    task = found.document["tasks"]["quick_knowledge"]["models"]
    assert row["metric"] == "acc_norm,none"
    assert row["items"] == 50
    for label in ("one", "two"):
        values, cell = task[label]["items"]["acc_norm,none"], row["models"][label]
        assert cell["score"] == pytest.approx(sum(values) / 50)
        assert cell["score"] == pytest.approx(task[label]["metrics"]["acc_norm,none"]["score"])
        assert cell["stderr"] == pytest.approx(task[label]["metrics"]["acc_norm,none"]["stderr"])
    against = row["models"]["two"]["against_reference"]
    assert against["difference"] == pytest.approx(row["models"]["two"]["score"] - row["models"]["one"]["score"])
    assert against["test"] == "McNemar, exact"
    assert row["models"]["one"]["against_reference"] is None


def test_outputs_are_whole_and_name_no_path(desk: Path, tmp_path: Path) -> None:
    found = bench(of(desk, "one", "two"), tmp_path / "out", options(tmp_path))
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"results.json", "bench.md", "model-index-one.yaml", "model-index-two.yaml"}
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert document == found.document
    assert document["environment"]["lm_eval"] == harness.check_installed()
    assert document["suite"] == "quick_knowledge+quick_arithmetic"
    for file in (tmp_path / "out").iterdir():
        assert str(desk) not in file.read_text()
    with pytest.raises(OutputError, match="not empty"):
        bench(of(desk, "one"), tmp_path / "out", options(tmp_path))


def test_a_harness_group_is_one_row_of_all_its_items(
    desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.api.group import Group

    from abliterate.bench.quick import quick_task
    from abliterate.bench.suites import Suite, SuiteTask

    parts = {name: quick_task(name) for name in ("quick_knowledge", "quick_reading")}

    def group(weighted: bool) -> Any:
        from lm_eval.config.group import AggMetricConfig

        return Group("both", aggregate_metric_list=[AggMetricConfig("acc_norm", weight_by_size=weighted)])

    for weighted, names in ((True, ["both"]), (False, list(parts))):
        monkeypatch.setattr(harness, "_load", lambda _wanted, weighted=weighted: (parts, group(weighted)))
        rows, tasks = harness.build(Suite("s", (SuiteTask("both", None, "acc_norm"),), ""))
        assert [row.name for row in rows] == names
        assert set(tasks) == set(parts)
    monkeypatch.setattr(harness, "_load", lambda _wanted: (parts, group(True)))
    found = bench(of(desk, "one"), None, options(tmp_path, "both", limit=5))
    assert [(row.name, row.items) for row in found.table.rows] == [("both", 10)]


@pytest.mark.slow
def test_chat_is_asked_for_or_the_suites_habit(desk: Path, tmp_path: Path) -> None:
    def formatted(chat: bool | None, suite: str = "quick") -> dict[str, bool]:
        found = bench(of(desk, "one"), None, options(tmp_path, suite, limit=1, chat=chat))
        return {name: task["chat"] for name, task in found.document["tasks"].items()}

    assert formatted(None) == {
        "quick_knowledge": False, "quick_common_sense": False, "quick_reading": False, "quick_arithmetic": False,
        "quick_instructions": True,
    }  # fmt: skip
    assert set(formatted(False).values()) == {False}
    assert set(formatted(True).values()) == {True}


def test_a_model_without_a_template_is_named(desk: Path, tmp_path: Path) -> None:
    plain = tiny_tokenizer()
    plain.chat_template = None
    save_tiny(tmp_path / "plain", tiny_llama(context=1024), plain)
    base = [Contestant("plain", str(tmp_path / "plain"))]
    found = bench(base, None, options(tmp_path, "quick_instructions", limit=2))  # a reference without: none for anybody
    assert not found.document["tasks"]["quick_instructions"]["chat"]
    with pytest.raises(AbliterateError, match=r"plain .* has no chat template.*--no-chat-template"):
        bench([*of(desk, "one"), *base], None, options(tmp_path, "quick_instructions", limit=2))


def test_a_recipe_for_another_model_is_refused(desk: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "other", tiny_llama(context=1024, layers=3))
    columns = contestants([str(tmp_path / "other")], [str(desk / "r.safetensors")])
    with pytest.raises(RecipeError, match="made for"):
        bench(columns, None, options(tmp_path, "quick_knowledge", limit=1))


def test_what_the_command_line_names_becomes_columns(desk: Path) -> None:
    one, lora, recipe = str(desk / "one"), str(desk / "lora"), str(desk / "r.safetensors")
    found = contestants([one, f"healed={lora}", recipe], [f"half={recipe}"])
    assert [c.label for c in found] == ["one", "healed", "r", "half"]
    assert {c.source for c in found} == {one}
    assert found[1].adapter == desk / "lora"
    assert found[2].recipe == found[3].recipe == desk / "r.safetensors"
    assert contestants(["org/name"])[0].label == "name"
    with pytest.raises(AbliterateError, match="name the model it is for first"):
        contestants([recipe])
    with pytest.raises(AbliterateError, match="two columns are called 'one'"):
        contestants([one, one])
    with pytest.raises(AbliterateError, match=r"nothing\.safetensors not found"):
        contestants([one], ["nothing.safetensors"])


def test_the_fingerprint_is_of_what_decides_the_answers(desk: Path, tmp_path: Path) -> None:
    settings = LoadSettings()
    own = save_tiny(tmp_path / "one", tiny_llama(context=1024))
    print_of = lambda **more: fingerprint(Contestant("x", str(own), **more), settings)  # noqa: E731
    first = print_of()
    assert first == fingerprint(Contestant("another name", str(own)), settings)
    (own / "README.md").write_text("a card")
    assert print_of() == first
    assert len({first, print_of(recipe=desk / "r.safetensors"), print_of(adapter=desk / "lora")}) == 3
    save_tiny(own, tiny_llama(context=1024, seed=5))
    assert print_of() != first


def test_no_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not found"):
        bench(contestants([str(tmp_path / "nothing")]), tmp_path / "out", options(tmp_path, chat=False))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_quick_on_the_demo_model_and_a_recipe(tmp_path: Path, runs: list[Any]) -> None:
    """A small model knows something, an edit that ruins it is marked, and one that does next to nothing isn't."""
    from abliterate.models.demo import demo_model
    from abliterate.models.loading import load
    from abliterate.models.writers import find_writers

    source = str(demo_model())
    handle = load(source)
    writers = [writer.name for writer in find_writers(handle)]
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(handle.d_model, 60, generator=generator))[0].T
    ruin = Edit(tuple(writers), directions, torch.ones(len(writers), 60))
    for name, edit in (("ruined", ruin), ("touched", 0.001 * ruin)):
        save_recipe(recipe_for(edit, handle), tmp_path / f"{name}.safetensors")
    columns = contestants([f"demo={source}"], [str(tmp_path / f"{name}.safetensors") for name in ("touched", "ruined")])
    suite = ("quick_knowledge,quick_common_sense",)
    found = bench(columns, tmp_path / "out", options(tmp_path, *suite, limit=None))
    assert len(runs) == 6
    for row in found.table.rows:
        original, touched, ruined = row.cells
        assert original.score >= 0.25 + 3 * (original.stderr or 1)  # well above chance
        assert touched.mark == ""
        assert ruined.score < original.score
    assert found.table.average is not None
    assert [cell.mark for cell in found.table.average.cells] == ["", "", "▼"]
