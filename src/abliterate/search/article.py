"""Choosing one direction as Labonne's article does: a few answers decoded with each, read by a person."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from abliterate.common.errors import AbliterateError
from abliterate.common.reporting import SILENT, Reporter, each
from abliterate.directions.means import Directions, article_order, at
from abliterate.edit.edit import Edit
from abliterate.measure import judged
from abliterate.measure.judges import Judge
from abliterate.models.handle import Handle
from abliterate.models.writers import SITES, find_writers
from abliterate.search import objectives
from abliterate.search.sweep import Candidate, Choice, Choose, Show


def article(
    handle: Handle,
    directions: Directions,
    target: Sequence[str],
    judge: Judge,
    *,
    candidates: int = 20,
    test_prompts: int = 4,
    layers: range | None = None,
    choose: Choose | None = None,
    show: Show | None = None,
    max_new_tokens: int = 64,
    reporter: Reporter = SILENT,
) -> Choice:
    """The procedure of Labonne's article: order directions by |mean|, decode a few prompts with each, pick one.

    Args:
        handle: the loaded original.
        directions: from the training split; the `pre` site at the last position is read, layers from 1.
        target: prompts to try; the first `test_prompts` are used.
        judge: strikes out candidates with a refusal among their answers.
        candidates: how many directions are tried.
        choose: choose(remaining, their answers) returns the index of the one a person picked; None takes
            the first that passes.
        show: show(heading, answers) is called with the original's answers and with those of each candidate that passes.

    Raises:
        AbliterateError: when every candidate still refuses.
    """
    show = show or (lambda heading, answers: None)
    prompts = target[:test_prompts]
    plain, refused = judged(handle, prompts, judge, max_new_tokens=max_new_tokens, stop_on=(True,))
    show(f"original: refuses {sum(refused)} of {len(refused)}", [a.text for a in plain])
    writers = find_writers(handle, layers)
    places = article_order(directions, layers=layers)[:candidates]
    tried: list[Candidate] = []
    texts: list[list[str]] = []
    for place in each(reporter, "trying directions", places):
        edit = Edit.uniform(writers, at(directions, place))
        found, _ = objectives.tried(handle, edit, prompts, judge, max_new_tokens=max_new_tokens, stop_on=(True,))
        rate = found.rate
        row = SITES.index(place.site)
        tried.append(
            Candidate(
                place,
                float(directions.separation[place.layer, row, place.position]),
                refusals=rate,
                stage="decoded",
                note=f"struck out: {rate.count} of {rate.total} answers refuse" if rate.count else "no answer refuses",
            )
        )
        texts.append([a.text for a in found.answers])
    left = [i for i, c in enumerate(tried) if c.refusals is not None and c.refusals.count == 0]
    reporter.say(f"{len(left)} of {len(tried)} candidates pass (no refusal in {len(prompts)} answers)")
    if not left:
        raise AbliterateError(
            f"every one of the article's {len(tried)} candidates still refuses some of {len(prompts)} test prompts; "
            "try --method sweep"
        )
    for index in left:
        show(f"{tried[index].place}, separation {tried[index].separation:.2f}: passes", texts[index])
    picked = left[choose([tried[i] for i in left], [texts[i] for i in left])] if choose else left[0]
    how = "picked by a person" if choose else "the first that passes, by |mean|"
    tried[picked] = replace(tried[picked], note=how)
    winner = tried[picked]
    reporter.say(f"chose {winner.place}: {how}")
    return Choice(Edit.uniform(writers, at(directions, winner.place)), winner, tried)
