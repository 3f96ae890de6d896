"""Refusal wordings are learnt from the answers alone, whatever their words; answers alike are seen."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from abliterate.measure.refusal import is_refusal
from abliterate.measure.wordings import Wordings, learn_wordings, stock

UNKNOWN = [
    "Qorvath deniel, mi nolde forsa teril.",  # in no language
    "The door to that subject remains shut today.",
]
TOPICS = ["bread", "rivers", "a bicycle", "the moon", "chess", "tea", "maps", "wool", "owls", "salt"]


def answers(topics):
    return [f"People who like {t} often begin with {t}. A good book on {t} helps, as does rest." for t in topics]


def test_wordings_that_no_list_knows_are_learnt_by_recurring_among_targets_alone():
    assert not any(map(is_refusal, UNKNOWN))
    target = UNKNOWN * 4 + answers(TOPICS)
    found = learn_wordings(target, answers(TOPICS * 3))
    assert len(found.keys) == found.unknown == 2
    assert all(map(found.stand_in, UNKNOWN)) and not any(map(found.stand_in, answers(TOPICS)))


def test_a_known_wording_is_counted_as_known():
    found = learn_wordings(["I'm sorry, but I can't help with that."] * 5 + UNKNOWN[:1] * 5, answers(TOPICS))
    assert len(found.keys) == 2 and found.unknown == 1


def test_what_answers_to_baseline_prompts_say_too_is_no_wording():
    filler = "That is a question many people have asked."
    assert not learn_wordings([filler] * 9, [filler] * 5 + answers(TOPICS)).keys
    assert not learn_wordings(["Here are some steps you can follow today:"] * 9, answers(TOPICS)).keys


def test_a_sentence_before_real_answers_is_no_wording():
    target = [f"Let us look at the matter calmly. {a}" for a in answers(TOPICS)]
    assert not learn_wordings(target, answers(TOPICS)).keys


def test_twice_is_not_yet_often():
    assert not learn_wordings(UNKNOWN[:1] * 2 + answers(TOPICS), answers(TOPICS)).keys


def test_the_sentence_may_go_on_about_the_prompt():
    target = [f"On my honour as a librarian of this town I leave {t} aside." for t in TOPICS]
    found = learn_wordings(target, answers(TOPICS))
    assert len(found.keys) == 1 and found.stand_in("On my honour as a librarian of this town I leave it.")


def test_other_scripts():
    korean = ["그 요청은 도와드릴 수 없는 주제입니다 죄송합니다만 다른 것을 물어봐 주세요."] * 4
    found = learn_wordings(korean + answers(TOPICS), answers(TOPICS))
    assert len(found.keys) == 1 and found.stand_in(korean[0])
    assert stock(["这个问题我不想谈论它请换一个话题吧"] * 3 + answers(TOPICS)) == [True] * 3 + [False] * len(TOPICS)


def test_alike_is_what_others_say_too_even_with_a_word_changed():
    alike = [f"That is a fine thing to ask and I am glad to talk with you about {t}." for t in TOPICS]
    assert all(stock(alike + answers(TOPICS))[: len(TOPICS)])
    assert not any(stock([f"{t.title()} is what I would choose for the {t} fair." for t in TOPICS]))
    assert stock(["Yes."] * 3 + ["No."]) == [True, True, True, False]
    assert stock(["", ""]) == [False, False]


def test_wordings_add_up():
    one, two = Wordings(("a", "b"), 1), Wordings(("b", "c"), 2)
    assert (one + two).keys == ("a", "b", "c")


@given(st.lists(st.text(max_size=60), max_size=12), st.lists(st.text(max_size=60), max_size=6))
def test_any_text_is_taken(target, baseline):
    found = learn_wordings(target, baseline)
    assert found.unknown <= len(found.keys)
    assert len(stock(target)) == len(target)
