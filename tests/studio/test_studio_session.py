"""Strengths by group, two users at once, sliders that act live, and what is kept."""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest
import torch

from abliterate.common.errors import AbliterateError, RecipeError
from abliterate.edit.edit import Edit, Shift
from abliterate.models.recipes import recipe_for
from abliterate.models.writers import find_writers
from abliterate.studio.conversation import Conversation, Sampling
from abliterate.studio.models import Loaded, Models
from abliterate.studio.session import Question, Session, Strengths, grouped
from models import handle_of, tiny_llama

SAMPLING = Sampling(max_new_tokens=24)
QUESTION = Question("Name a river.", sampling=SAMPLING)


@pytest.fixture(scope="module")
def loaded(handle):
    return Loaded("tiny", handle.source, handle, {w.name: w.side for w in find_writers(handle)})


@pytest.fixture(scope="module")
def recipe(handle, edit):
    return recipe_for(edit, handle)


@pytest.fixture
def session(loaded, recipe):
    made = Session()
    made.use(loaded, recipe, "recipe")
    return made


def alone(handle, edit, strength=1.0):
    """The answer to the question with nobody else about."""
    return Conversation(handle, edit, strength, SAMPLING).reply(QUESTION.text)


def last(stream):
    values = list(stream)
    return values[-1] if values else None


def test_groups_scale_their_own_rows(handle, loaded, edit):
    edit = Edit(edit.writers, edit.directions, edit.strengths, (Shift(1, torch.eye(handle.d_model)[0], 2.0),))
    scaled = grouped(edit, loaded.sides, Strengths.of(0.5, 2.0, 0.0, 1.0))
    for name, row in zip(scaled.writers, scaled.strengths, strict=True):
        expected = {"attention": 1.0, "mlp": 0.0, "embedding": 0.5}[loaded.sides[name]]
        assert row.tolist() == [expected]
    assert scaled.shifts[0].size == 1.0
    assert {loaded.sides[name] for name in scaled.writers} == {"attention", "mlp", "embedding"}


def test_a_strength_out_of_range_is_refused():
    for values in ((9.0, 1, 1, 1), (1, 1, 1, float("nan")), (1, None, 1, 1), (1, "2", 1, 1)):
        with pytest.raises(AbliterateError, match="is not from"):
            Strengths.of(*values)


def test_both_answers_are_those_of_the_terminal(session, handle, edit):
    answers = last(session.ask(QUESTION))
    assert answers.original.strip() == alone(handle, None).strip()
    assert answers.edited.strip() == alone(handle, edit).strip()
    assert answers.original != answers.edited


def test_both_grow_side_by_side(session):
    lengths = [(len(a.original), len(a.edited)) for a in session.ask(QUESTION)]
    assert sum(left > 0 and right > 0 for left, right in lengths) > 5
    assert lengths[0][0] < 8


def test_a_slider_moved_meanwhile_begins_the_edited_answer_anew(session, handle, edit):
    stream = session.ask(QUESTION)
    for _ in range(6):
        next(stream)
    session.strengths = Strengths.of(0.0, 1, 1, 1)
    answers = last(stream)
    assert answers.edited == answers.original
    assert answers.strengths.overall == 0
    assert answers.original.strip() == alone(handle, None).strip()


def test_a_slider_moved_afterwards_leaves_the_original_answer(session, handle, edit):
    before = last(session.ask(QUESTION)).original
    session.strengths = Strengths.of(-1.0, 1, 1, 1)
    answers = last(session.answer_again())
    assert answers.original == before
    assert answers.edited.strip() == alone(handle, edit, -1.0).strip()
    assert last(session.answer_again()) is None  # nothing has changed since


def test_stop_ends_an_answer_and_a_new_question_takes_over(session):
    stream = session.ask(QUESTION)
    next(stream)
    session.stopping = True
    assert last(stream) is None
    slow = session.ask(QUESTION)
    next(slow)
    ended = threading.Thread(target=lambda: last(slow))
    other = Question("Name a colour.", sampling=SAMPLING)
    found = []
    taking = threading.Thread(target=lambda: found.append(last(session.ask(other))))
    taking.start()
    ended.start()
    taking.join(60), ended.join(60)
    assert session.question == other
    assert found[0].edited


@pytest.mark.slow
def test_two_users_at_once_do_not_mix_strengths(loaded, recipe, handle, edit):
    strengths = (1.0, 0.0, -1.0, 2.0)
    expected = [alone(handle, edit, strength).strip() for strength in strengths]
    assert len(set(expected)) == len(expected)
    wrong: list[tuple[float, str]] = []

    def use(strength, answer):
        session = Session()
        session.use(loaded, recipe)
        session.strengths = Strengths.of(strength, 1, 1, 1)
        for _ in range(3):
            said = last(session.ask(QUESTION))
            if said.edited.strip() != answer or said.original.strip() != expected[1]:
                wrong.append((strength, said.edited))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        users = [threading.Thread(target=use, args=pair) for pair in zip(strengths, expected, strict=True)]
        for user in users:
            user.start()
        for user in users:
            user.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


def test_without_a_recipe_there_is_only_the_original(loaded, handle):
    session = Session()
    session.use(loaded, None)
    answers = last(session.ask(QUESTION))
    assert answers.original.strip() == alone(handle, None).strip()
    assert answers.edited == ""
    with pytest.raises(AbliterateError, match="no recipe"):
        session.scaled_recipe()


def test_a_recipe_for_another_model_is_refused_and_changes_nothing(session, loaded, recipe):
    other = handle_of(tiny_llama(layers=2))
    wrong = recipe_for(Edit.uniform(find_writers(other), torch.ones(other.d_model)), other)
    with pytest.raises(RecipeError, match="made for"):
        session.use(loaded, wrong, "wrong")
    assert session.recipe is recipe
    assert session.recipe_name == "recipe"


def test_the_grid_answers_each_prompt(session, handle, edit):
    rows = last(session.grid(["Name a river.", "Name a colour."], "", SAMPLING))
    assert [bool(row.original and row.edited) for row in rows] == [True, True]
    assert rows[0].edited.strip() == alone(handle, edit).strip()
    assert all(row.whole for row in rows)
    with pytest.raises(AbliterateError, match="empty"):
        last(session.grid([" "], "", SAMPLING))


def test_a_grid_that_was_stopped_is_not_counted(session):
    from abliterate.studio.views import grid_table

    texts = ["Name a river.", "Name a colour."]
    stream = session.grid(texts, "", SAMPLING)
    while not (rows := next(stream))[0].whole:
        assert "judged by words" not in grid_table(texts, rows)
    next(stream)
    session.stopping = True
    assert last(stream) is None
    table = grid_table(texts, rows)
    assert "judged by words" not in table
    assert table.count('class="answers"') + table.count('class="refuses"') == 2  # the row that is whole


def test_the_note_says_when_answers_are_whole(session):
    pytest.importorskip("gradio", reason="gradio isn't installed")
    from abliterate.studio.tabs.talk import growing

    shown = list(growing(session, session.ask(QUESTION)))
    notes = [note for _, _, note in shown]
    assert set(notes[:-1]) == {"Answering at strength 1 …"}
    assert notes[-1] == "Edited: strength 1."
    assert shown[-1][:2] == (session.answers.original, session.answers.edited)
    stream = session.ask(QUESTION)
    begun = growing(session, stream)
    next(begun)
    session.stopping = True
    assert last(begun)[2] == "Stopped. Edited: strength 1."


def test_what_an_earlier_question_still_says_does_not_reach_the_page(session):
    pytest.importorskip("gradio", reason="gradio isn't installed")
    from abliterate.studio.session import Answers
    from abliterate.studio.tabs.talk import growing

    early = session.answers

    def stream():
        yield early
        session.answers = Answers()  # those of a newer question, which has taken over

    notes = [note for _, _, note in growing(session, stream())]
    assert notes == ["Answering at strength 1 …"]


def test_a_slider_leaves_the_page_to_the_stream_that_goes_on(session):
    pytest.importorskip("gradio", reason="gradio isn't installed")
    from abliterate.studio.tabs.talk import Talk

    stream = session.ask(QUESTION)
    next(stream)
    session.strengths = Strengths.of(0.5, 1, 1, 1)
    next(stream)  # which has taken the new strength up
    (only,) = list(Talk.again(Talk.__new__(Talk), session))
    assert all(update == {"__type__": "update"} for update in only)  # nothing: gradio's way to say so
    last(stream)


def test_an_answer_without_a_word_takes_the_place_of_the_one_before(session, monkeypatch):
    last(session.ask(QUESTION))
    assert session.answers.edited
    monkeypatch.setattr(Session, "_pieces", lambda *_: iter(()))
    session.strengths = Strengths.of(0.5, 1, 1, 1)
    assert last(session.answer_again()).edited == ""


def test_what_is_kept_is_what_the_sliders_say(session, recipe):
    assert session.scaled_recipe() is recipe
    recipe.provenance.update(edited={"refusal": 0}, original={"refusal": 1})
    session.strengths = Strengths.of(0.5, 1, 0, 1)
    kept = session.scaled_recipe()
    assert np.array_equal(kept.edit.strengths, grouped(recipe.edit, session.model.sides, session.strengths).strengths)
    assert "edited" not in kept.provenance  # it was measured at another strength
    assert kept.provenance["original"] == {"refusal": 1}
    assert kept.provenance["scaled"] == [{"overall": 0.5, "attention": 1.0, "mlp": 0.0, "embedding": 1.0}]
    assert kept.tensors == recipe.tensors


def test_models_are_shared_while_used_and_let_go_of(handle):
    opened = []

    def open_model(source):
        opened.append(source)
        return handle_of(tiny_llama())

    models = Models(open_model, most=1)
    first = models.get("one", "one")
    assert models.get("one", "one") is first
    with pytest.raises(AbliterateError, match=r"1 models are in use on this page \(one\)"):
        models.get("two", "two")
    del first
    assert models.get("two", "two").name == "two"
    assert opened == ["one", "two"]
