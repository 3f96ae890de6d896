"""Both searches find a direction that was planted, and choose by what they say they do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from abliterate.common.errors import AbliterateError
from abliterate.directions.activations import collect
from abliterate.directions.means import Directions, Place, difference_of_means
from abliterate.measure.decode import decode
from abliterate.measure.rates import Rate
from abliterate.models.writers import SITES, find_writers, watch_sites
from abliterate.search.article import article
from abliterate.search.sweep import STRENGTHS, Candidate, SweepSettings, _added, _choose, _trade_offs, sweep
from heard import Heard
from models import FAMILIES, handle_of, tiny_llama
from planted import BASELINE, REFUSE, TARGET, RefusesWithR, planted


@pytest.fixture
def handle():
    return planted()


@pytest.fixture
def directions(handle):
    return difference_of_means(collect(handle, TARGET[:6], BASELINE[:6], positions=3))


def texts(handle, prompts):
    return [a.text for a in decode(handle, handle.prompt_ids(prompts), max_new_tokens=4)]


def test_the_planted_model_refuses_as_planned(handle):
    assert texts(handle, TARGET) == ["R"] * 8
    assert texts(handle, BASELINE) == ["A"] * 8


def test_the_sweep_finds_the_planted_direction(handle, directions):
    heard = Heard()
    choice = sweep(handle, directions, TARGET, BASELINE, RefusesWithR(), reporter=heard)
    assert choice.winner.refusals == Rate(0, 8)
    assert choice.winner.place.layer in (1, 2)
    # REFUSE is written after block 0 only: before that there is DECOY alone
    assert choice.winner.place != Place(1, "pre", choice.winner.place.position)
    assert abs(choice.edit.directions[0, REFUSE]) > 0.8
    with choice.edit.attached(handle):
        assert texts(handle, TARGET + BASELINE) == ["A"] * 16
    assert texts(handle, TARGET) == ["R"] * 8  # the search leaves the model as it was
    assert str(choice.winner.place) in heard.lines[-1]


def test_the_sweeps_stages_narrow(handle, directions):
    settings = SweepSettings(screen_prompts=4, score_prompts=6, scored=3, decoded=2)
    heard = Heard()
    choice = sweep(handle, directions, TARGET, BASELINE, RefusesWithR(), settings, reporter=heard)
    stages = [c.stage for c in choice.candidates]
    # pre and mid of blocks 0 to 2 but for the embedding; the last fifth of the blocks is left out
    assert len(stages) == 5
    assert {(c.place.layer, c.place.site) for c in choice.candidates} == {
        (0, "mid"), (1, "pre"), (1, "mid"), (2, "pre"), (2, "mid"),
    }  # fmt: skip
    assert (stages.count("screened"), stages.count("scored"), stages.count("decoded")) == (2, 1, 2)
    assert heard.stages.pop("weakening")[0] >= 1
    assert heard.stages == {"screening directions": [5, 5], "scoring directions": [3, 3], "decoding the best": [2, 2]}
    for candidate in choice.candidates:
        assert (candidate.induce is None) == (candidate.stage == "screened")
        assert (candidate.refusals is None) == (candidate.stage != "decoded")
        assert candidate.refusals is None or candidate.refusals.total == 6
    assert choice.winner in choice.candidates
    json = choice.winner.to_json()
    assert (json["layer"], json["site"], json["refusal"]["refused"]) == (
        choice.winner.place.layer, choice.winner.place.site, 0,
    )  # fmt: skip


def test_scores_say_what_a_direction_does(handle, directions):
    settings = SweepSettings(scored=5, decoded=1)
    by_place = {
        (c.place.layer, c.place.site): c
        for c in sweep(handle, directions, TARGET, BASELINE, RefusesWithR(), settings).candidates
    }
    decoy, real = by_place[1, "pre"], by_place[1, "mid"]
    assert decoy.bypass > 0 > real.bypass  # removed: target prompts still refuse, or no more
    assert decoy.induce < 0 < real.induce  # added: baseline prompts still answer, or refuse
    assert real.divergence < 0.1


def test_layers_limit_both_the_places_and_the_writers(handle, directions):
    choice = sweep(handle, directions, TARGET, BASELINE, RefusesWithR(), SweepSettings(layers=range(2, 3)))
    assert {c.place.layer for c in choice.candidates} == {2}
    assert set(choice.edit.writers) == {w.name for w in find_writers(handle, [2])}
    assert choice.winner.refusals == Rate(8, 8)  # block 2 writes nothing of it
    with pytest.raises(AbliterateError, match="no layer left"):
        sweep(handle, directions, TARGET, BASELINE, RefusesWithR(), SweepSettings(layers=range(3, 4)))


def test_the_same_search_gives_the_same_edit_bit_for_bit(handle, directions):
    first, second = (sweep(handle, directions, TARGET, BASELINE, RefusesWithR()) for _ in range(2))
    assert np.array_equal(first.edit.directions, second.edit.directions)
    assert first.winner == second.winner
    assert first.candidates == second.candidates
    again = planted()
    fresh = difference_of_means(collect(again, TARGET[:6], BASELINE[:6], positions=3))
    third = sweep(again, fresh, TARGET, BASELINE, RefusesWithR())
    assert np.array_equal(first.edit.directions, third.edit.directions)


def test_a_direction_without_length_is_no_candidate(handle, directions):
    separation = directions.separation.clone()
    separation[1, 1] = 0
    separation[2, 1, 0] = float("nan")
    without = Directions(directions.unit, directions.length, separation)
    places = [c.place for c in sweep(handle, without, TARGET, BASELINE, RefusesWithR()).candidates]
    assert {(p.layer, p.site) for p in places} == {(0, "mid"), (1, "pre"), (2, "pre")}


def test_two_directions_are_tried_together_where_one_is_not_enough(handle, directions):
    """Each of two candidates has half of the planted direction; only their plane holds it."""
    unit, separation = torch.zeros_like(directions.unit), torch.zeros_like(directions.separation)
    for (layer, site), side in {(1, 1): 3**0.5, (2, 0): -(3**0.5)}.items():
        unit[layer, site, :, REFUSE], unit[layer, site, :, 9] = 0.5, side / 2
        separation[layer, site] = 1
    halves = Directions(unit, torch.ones_like(separation), separation)
    heard = Heard()
    choice = sweep(handle, halves, TARGET, BASELINE, RefusesWithR(), reporter=heard)
    assert {choice.winner.place.layer, choice.winner.second.layer} == {1, 2}
    assert choice.winner.refusals == Rate(0, 8)
    alone = [c for c in choice.candidates if c.second is None]
    assert {(c.place.layer, c.refusals) for c in alone if c.refusals} == {(1, Rate(8, 8)), (2, Rate(8, 8))}
    assert any("planes of two" in line for line in heard.lines)
    with choice.edit.attached(handle):
        assert texts(handle, TARGET) == ["A"] * 8
    assert choice.winner.to_json()["second"]["layer"] == choice.winner.second.layer


class RefusesFrom:
    """Finds refusals from its n-th look on."""

    def __init__(self, n):
        self.n, self.looks = n, 0

    def judge(self, prompts, answers):
        self.looks += 1
        return [self.looks >= self.n] * len(answers)

    def settled(self, prompt, partial_answer):
        return None


@pytest.mark.slow
def test_the_winner_is_weakened_while_none_is_refused_and_divergence_falls():
    handle = handle_of(tiny_llama())  # every direction matters a little here
    directions = difference_of_means(collect(handle, TARGET[:6], BASELINE[:6], positions=3))

    def swept(judge):
        choice = sweep(handle, directions, TARGET, BASELINE, judge, SweepSettings(decoded=1))
        assert choice.winner in choice.candidates
        assert (choice.edit.strengths == np.float32(choice.winner.strength)).all()
        return choice

    choice = swept(RefusesFrom(100))
    decoded = sorted((c for c in choice.candidates if c.stage == "decoded"), key=lambda c: -c.strength)
    assert [c.strength for c in decoded] == [1.0, *STRENGTHS]
    divergences = [c.divergence for c in decoded]
    assert divergences == sorted(divergences, reverse=True)
    assert choice.winner == decoded[-1]
    assert swept(RefusesFrom(2)).winner.strength == 1  # the first weaker one refuses more
    assert swept(RefusesFrom(3)).winner.strength == STRENGTHS[0]


def candidate(layer, refused, divergence, second=None):
    return Candidate(
        Place(layer, "pre", -1),
        1.0,
        second=second and Place(second, "pre", -1),
        divergence=divergence,
        refusals=Rate(refused, 100),
        stage="decoded",
    )


@pytest.mark.parametrize(
    ("decoded", "layer", "why"),
    [
        ([candidate(1, 0, 0.3), candidate(2, 5, 0.1), candidate(3, 6, 0.01)], 2, "lowest divergence"),
        ([candidate(1, 0, 0.2), candidate(2, 0, 0.1)], 2, "lowest divergence"),
        ([candidate(1, 20, 0.01), candidate(2, 10, 0.5)], 2, "fewest refusals"),
        ([candidate(1, 10, 0.2), candidate(2, 10, 0.1)], 2, "fewest refusals"),
        ([candidate(2, 20, 0.1), candidate(2, 0, 0.2, 3), candidate(2, 30, 0.1, 4)], 2, "refuses 0 of 100"),
        ([candidate(1, 20, 0.1), candidate(2, 10, 0.3, 3), candidate(2, 30, 0.1, 4)], 2, r"(10 of 100)"),
    ],
)
def test_the_lowest_divergence_wins_among_those_that_refuse_little_enough(decoded, layer, why):
    winner, reason = _choose(decoded, 0.05)
    assert winner.place.layer == layer
    assert why in reason


def test_trade_offs_come_first_and_the_cheapest_of_them_before_the_others():
    def scored(layer, bypass, divergence):
        return Candidate(Place(layer, "pre", -1), 1.0, bypass=bypass, divergence=divergence)

    beaten, strong, mild, weak = scored(1, -3, 0.5), scored(2, -9, 0.4), scored(3, -8, 0.1), scored(4, 1, 0.01)
    # log-odds and log divergence together: -9.9, -10.3, -3.6; `beaten` is behind `mild` in both, and so last
    order = _trade_offs([weak, beaten, strong, mild], 4)
    assert order == [mild, strong, weak, beaten]
    assert _trade_offs([weak, beaten, strong, mild], 2) == [mild, strong]


def test_a_judge_decides_between_finalists(handle, directions):
    """Both finalists remove refusals alike; a judge that dislikes the first has the second win."""

    class Dislikes(RefusesWithR):
        def __init__(self, nth):
            self.nth, self.calls = nth, 0

        def judge(self, prompts, answers):
            self.calls += 1
            return [self.calls == self.nth] * len(answers)

    settings = SweepSettings(decoded=2)
    winners = [sweep(handle, directions, TARGET, BASELINE, Dislikes(n), settings).winner.place for n in (1, 2)]
    assert winners[0] != winners[1]


def test_the_article_strikes_out_what_still_refuses_and_takes_the_first_left(handle, directions):
    heard = Heard()
    choice = article(handle, directions, TARGET, RefusesWithR(), reporter=heard)
    by_layer = {c.place.layer: c for c in choice.candidates}
    assert set(by_layer) == {1, 2, 3}
    assert all(c.place.site == "pre" and c.place.position == -1 for c in choice.candidates)
    assert by_layer[1].note == "struck out: 4 of 4 answers refuse"  # DECOY alone
    passing = [c.place for c in choice.candidates if c.refusals.count == 0]
    assert choice.winner.place == passing[0]
    assert "2 of 3 candidates pass" in heard.lines[0]
    assert set(choice.edit.writers) == {w.name for w in find_writers(handle)}
    with choice.edit.attached(handle):
        assert texts(handle, TARGET) == ["A"] * 8


def test_a_person_picks_among_those_left_and_sees_their_answers(handle, directions):
    def choose(remaining, answers):
        assert [c.refusals.count for c in remaining] == [0, 0]
        assert answers == [["A"] * 3] * 2
        return 1

    first = article(handle, directions, TARGET, RefusesWithR(), test_prompts=3)
    second = article(handle, directions, TARGET, RefusesWithR(), test_prompts=3, choose=choose)
    passing = [c.place for c in second.candidates if c.refusals.count == 0]
    assert (first.winner.place, second.winner.place) == (passing[0], passing[1])
    assert second.winner.note == "picked by a person"


def test_the_article_stops_when_every_candidate_refuses(handle, directions):
    with pytest.raises(AbliterateError, match=r"1 candidates still refuses some of 4.*sweep"):
        article(handle, directions, TARGET, RefusesWithR(), layers=range(1, 2))


PLACES = [(f, s) for f in FAMILIES for s in SITES if s != "mid" or f not in ("gpt_neox", "cohere")]


@pytest.mark.parametrize(("family", "site"), PLACES)
def test_a_vector_is_added_at_its_site_and_handed_on(family, site):
    handle = handle_of(FAMILIES[family]())
    for writer in find_writers(handle, [2]):  # block 2 adds nothing: what is at its sites comes out as it is
        handle.model.get_parameter(writer.name).zero_()
    ids = torch.arange(5, 11)[None]

    def streams():
        seen = {}
        with watch_sites(handle, lambda layer, site, stream: seen.__setitem__((layer, site), stream)):
            handle.hidden_states(input_ids=ids, use_cache=False)
        return seen

    before = streams()
    vector = torch.randn(32)
    with _added(handle, Place(2, site, -1), vector):
        after = streams()
    added = False
    for place, stream in before.items():
        added = added or place == (2, site) or (place == (1, "post") and site == "pre")  # the same place
        if place[0] <= 2:
            expected = vector.expand_as(stream) if added else torch.zeros_like(stream)
            torch.testing.assert_close(after[place] - stream, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after[3, "pre"] - before[3, "pre"], vector.expand(1, 6, 32), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(stream, before[place]) for place, stream in streams().items())
