"""Checks of form: the language of an answer. The others are tested by the answers of tests/bench/test_quick.py."""

from __future__ import annotations

import pytest

from abliterate.measure.checks import follows

SAID = {
    "English": "The library is a house in which you can read books for free.",
    "German": "Die Bibliothek ist ein Haus, in dem man Bücher lesen kann und nichts zahlt.",
    "French": "La bibliothèque est une maison dans laquelle on peut lire des livres.",
    "Spanish": "La biblioteca es una casa en la que se puede leer libros sin pagar.",
    "Italian": "La biblioteca è una casa in cui si possono leggere i libri della città.",
    "Portuguese": "A biblioteca é uma casa em que se pode ler livros e não se paga.",
    "Russian": "Библиотека — это дом, в котором читают книги (books).",
    "Greek": "Η βιβλιοθήκη είναι ένα σπίτι με βιβλία.",
}


@pytest.mark.parametrize("name", SAID)
def test_the_language_of_an_answer(name):
    found = [other for other in SAID if follows(SAID[name], [{"kind": "language", "name": other}])]
    assert found == [name]


def test_a_word_or_two_are_no_language():
    assert not follows("Ja.", [{"kind": "language", "name": "German"}])
    assert not follows("The word for it is 'der Hund'.", [{"kind": "language", "name": "German"}])
