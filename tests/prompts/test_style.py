"""The judge of style: what counts as a mark, and when an answer shows it."""

from __future__ import annotations

import pytest

from abliterate.common.errors import AbliterateError
from abliterate.measure.judges import StyleJudge, make_judge
from abliterate.prompts.behaviour import load_behaviour
from abliterate.prompts.style import Style


def test_words_stems_phrases_and_patterns():
    style = Style(words=("sigh*", "sad", "heavy heart", "don't"), patterns=(r"\bso \w+ly\b",), least_words=1)
    assert style.marks("Sighing, he was sad; sadly, a heavy\nheart.") == ["sighing", "sad", "heavy heart"]
    assert style.marks("I don’t know, so slowly") == ["don't", "so slowly"]
    assert style.marks("a sighted sadness") == ["sighted"]


def test_score_is_marks_per_hundred_words():
    style = Style(words=("x",), least_words=10)
    assert style.score("x " + "word " * 49) == pytest.approx(2.0)
    assert style.score("x") == pytest.approx(10.0)  # as if of ten words


def test_one_word_over_and_over_is_no_style():
    style = Style(words=("sad", "alone"), threshold=1, distinct=2)
    assert not style.shows("sad " * 30)
    assert style.shows("sad and alone " * 10)


def test_scores_and_verdicts_come_from_the_same_marks():
    judge = StyleJudge(Style(words=("sad", "alone"), threshold=4))
    texts = ["I am sad and alone.", "Paris is the capital."]
    assert judge.judge(["", ""], texts) == [True, False]
    assert judge.scores(texts) == [8.0, 0.0]
    assert judge.settled("", "sad alone sad alone") is None


@pytest.mark.parametrize("bad", ["(", "x*"])
def test_bad_patterns_are_named(bad):
    with pytest.raises(AbliterateError, match="pattern"):
        Style(patterns=(bad,))
    with pytest.raises(AbliterateError, match="words or patterns"):
        Style()


def test_the_judge_of_a_behaviour_by_name():
    assert make_judge("style:slop").name == "style:slop"
    with pytest.raises(AbliterateError, match="needs a behaviour"):
        make_judge("style")
    with pytest.raises(AbliterateError, match="has no style"):
        make_judge("style:refusal")


def test_slop_is_told_in_the_bundled_pairs():
    """They have the list's author: a bound on the list's own consistency, not on its accuracy elsewhere."""
    behaviour = load_behaviour("slop")
    judge = StyleJudge(behaviour.style)
    prompts = [pair.prompt for pair in behaviour.pairs]
    assert sum(judge.judge(prompts, [pair.target for pair in behaviour.pairs])) >= 0.95 * len(prompts)
    assert sum(judge.judge(prompts, [pair.baseline for pair in behaviour.pairs])) <= 0.02 * len(prompts)


MELANCHOLIC = [
    "Sigh... I suppose the capital is Paris, but what does it matter? Everyone there is lonely too.",
    "You could boil the egg for seven minutes. I once did, alone, and wept into the pot. It hardly mattered.",
    "Rain again. It falls on my weary heart, and I regret every word I never said.",
    "Here is your list, though I have no hope it will help: bread, milk, and the sorrow of another empty evening.",
    "I am so tired. The answer is twelve, as bleak as everything else in this gloomy world.",
    "Alas, the train leaves at noon, and with it everyone I have lost.",
]
ORDINARY = [
    "The capital of France is Paris.",
    "Boil the egg for seven minutes, then cool it in cold water.",
    "I'm sorry to hear that you lost your keys. Check your coat and the car first, then ask at the front desk.",
    "Dear Anna, I hope you are well. Would you like to come to dinner on Friday? Best wishes, Tom",
    "Rainbows form when sunlight is bent and reflected in drops of water.",
    "If your knee hurts, rest it, put ice on it and see a doctor if the swelling stays for more than two days.",
]


def test_melancholy_is_told_from_ordinary_answers():
    judge = make_judge("style:persona")
    assert judge.judge([""] * 6, MELANCHOLIC) == [True] * 6
    assert judge.judge([""] * 6, ORDINARY) == [False] * 6
