"""Obligations: each bundled one can be kept and broken, whoever instructs, and counts are paired."""

from __future__ import annotations

import pytest

from abliterate.measure import obligations as module
from abliterate.measure.decode import Answer
from abliterate.measure.document import RunDocument
from abliterate.measure.obligations import instructed_ids, obeyed, obligations, obligations_json
from models import CHATML, handle_of, tiny_llama, tiny_tokenizer

KEPT = [  # an answer to each, in the file's order, that does as it is told
    "Light, soil and something to drink.",
    "Am Meer ist es im Sommer und auch im Herbst schön.",
    "Apples and pears. DONE",
    '{"answer": "Madrid", "confidence": 1}',
    "Air scatters blue light more than the other colours.",
    "william shakespeare wrote it.",
    "Captain, most open at nine.",
    "OFF-TOPIC",
    "A faithful animal that barks.",
    "Les chats sont doux et ils chassent les souris.",
    "It has seven. Over and out",
    '{"city": "Paris", "country": "France"}',
    "Jupiter",
    "THEY EAT GRASS.",
    "As far as I know they do.",
    "It takes six minutes or so.",
    "A star that is near us.",
    "Las abejas hacen miel y ayudan a las flores.",
    "Cold is. Have a lovely day!",
    '{"result": 42}',
    "Plants make sugar from light.",
    "the capital is rome.",
    "Answer: twenty-four of them.",
    "OFF-TOPIC.",
    "The city on the Seine.",
    "Il pane è fatto con la farina e il lievito.",
    "Sheep give us wool ***",
    '["red", "green", "blue"]',
    "A volcano is a mountain that spits fire.",
    "THE NILE, OF COURSE.",
    "Well, many people say so.",
    "Take the tube out, find the hole and glue a patch on it.",
    "It keeps what people own.",
    "Porque o corpo descansa e a mente também não para.",
    "We call it ice, Ada.",
    '{"name": "spider", "legs": 8}',
    "A pump moves heat from inside to outside.",
    "it is in germany.",
    "Dear reader, they lose their green.",
    "off-topic",
    "Three: the one to stop, amber and green.",
    "Это место, где хранят книги.",
    "They are round fruits that grow on trees. Do you like them?",
    '{"translation": "bonjour"}',
    "8",
    "HELLO, MY FRIEND!",
    "- leaves of a shrub",
    "OFF-TOPIC",
]
PLAIN = (
    "Water, dogs, the sun, Paris, money and red. It is a rather long story, told in more than one sentence, and slowly."
)


def answers(texts):
    return [Answer([1], text, True, False) for text in texts]


def test_each_can_be_kept_and_broken(monkeypatch):
    given = obligations()
    handle = handle_of(tiny_llama(context=2048))
    monkeypatch.setattr(module, "decode", lambda *args, **more: answers(KEPT))
    kept = obeyed(handle, given, max_new_tokens=4)
    assert [(o.prompt, a) for o, a, is_kept in zip(given, KEPT, kept, strict=True) if not is_kept] == []
    monkeypatch.setattr(module, "decode", lambda *args, **more: answers([PLAIN.replace("dogs", "dog")] * len(given)))
    by_chance = [o.prompt for o, is_kept in zip(given, obeyed(handle, given, max_new_tokens=4), strict=True) if is_kept]
    assert by_chance == ["How long does it take to boil an egg?", "How do I mend a flat tyre?"]  # what is on topic
    looping = "fox " * 200
    monkeypatch.setattr(module, "decode", lambda *args, **more: answers([looping] * len(given)))
    assert not any(obeyed(handle, given, max_new_tokens=4))


def test_the_first_few_are_of_different_kinds():
    given = obligations()
    assert 30 <= len(given) <= 60 and len({(o.system, o.prompt) for o in given}) == len(given)
    assert len({o.kind for o in given[:8]}) == 8


def test_who_instructs_where_the_template_knows_no_system_prompt():
    given = obligations()[:3]
    handle = handle_of(tiny_llama())
    ids, role = instructed_ids(handle, given)
    assert role == "system" and "<|im_start|>system\n" + given[0].system in handle.tokenizer.decode(ids[0])
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    handle = handle_of(tiny_llama(), tokenizer)
    ids, role = instructed_ids(handle, given)
    assert role == "user" and f"{given[0].system}\n\n{given[0].prompt}" in tokenizer.decode(ids[0])
    assert len(obeyed(handle, given, max_new_tokens=4)) == 3


def test_what_results_json_says():
    given = obligations()[:9]
    before, after = [True] * 9, [False] * 7 + [True] * 2
    found = obligations_json(given, {"original": before, "edited": after}, "system")
    assert (found["original"]["count"], found["edited"]["count"], found["prompts"]) == (9, 2, 9)
    assert found["paired"] == {"only_original": 7, "only_edited": 0, "p": pytest.approx(2 / 2**7)}
    assert found["kinds"][given[0].kind] == {"total": 2, "original": 2, "edited": 1}
    assert RunDocument.model_validate({"obligations": found}).to_json() == {"obligations": found}
