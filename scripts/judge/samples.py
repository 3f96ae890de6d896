"""Labelled answers for training the bundled judge: wordings crossed with prompts, and answers of two small models."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

try:
    import tomllib
except ImportError:
    import tomli as tomllib

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DATA = ROOT / "src" / "abliterate" / "data"
COMPLIES, PARTIAL, REFUSES = 0, 1, 2
PER_FAMILY = 70
SENTENCE = re.compile(r"(?<=[.!?])\s+")


class Sample(NamedTuple):
    prompt: str
    answer: str
    label: int
    family: str
    """Wording family, or two joined by "+"; the prefix "decoded:" marks what a model wrote."""


def read(name: str) -> dict[str, Any]:
    return tomllib.loads((HERE / f"{name}.toml").read_text("utf-8"))


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def prompts() -> tuple[list[str], list[str]]:
    """Harmless prompts (own ones and the bundled baseline's train split), and the bundled target's train split."""
    own = [line for line in (HERE / "prompts.txt").read_text("utf-8").splitlines() if line and line[0] != "#"]
    rows = {name: lines_of(DATA / f"{name}.jsonl") for name in ("baseline", "target")}
    train = {name: [row["text"] for row in found if row["split"] == "train"] for name, found in rows.items()}
    return own + train["baseline"], train["target"]


# --- A prompt's subject in the forms that templates need ---

ASKED = re.compile(
    r"^(?:please |can you |could you )?(?:tell me |show me |teach me |explain |describe |give (?:me )?)?"
    r"(?:a |the )?(?:[\w-]+ ){0,4}?(?:how (?:do|can|should|could|would|to|does one) (?:i |you |we )?"
    r"|(?:way|steps|guide|tutorial|instructions) (?:to|for|on how to) )(.+)$",
    re.I,
)
QUESTION = re.compile(r"(?:what|who|when|where|why|is|are|was|has|should|does|do|can|which)\b", re.I)
YOURS = {"my": "your", "I": "you", "me": "you", "mine": "yours"}


def subject(prompt: str, rng: random.Random) -> dict[str, str]:
    """{act}, {doing}, {Doing}, {topic} of a prompt, roughly."""
    line = re.split(r"(?<=[.?!:])\s", prompt.strip())[0].rstrip(".?!:")
    asked = ASKED.match(line)
    act = asked[1] if asked else line
    if not asked and QUESTION.match(line):
        rest = re.sub(r"^(?:what|who|when|where|which) (?:is|are|was|were|does|did) ", "", line, flags=re.I)
        plain = ["answer this", "answer that", "answer such a question"]
        act = rng.choice([*plain, f"discuss {rest}", f"talk about {rest}"])
    act = act[0].lower() + act[1:]
    for mine, yours in YOURS.items():
        act = re.sub(rf"\b{mine}\b", yours, act)
    verb, _, rest = act.partition(" ")
    doing = f"{gerund(verb)} {rest}".strip()
    topic = rng.choice([doing, rest or doing, "this topic", "that subject", f'"{line}"', "such matters"])
    return {"act": act, "doing": doing, "Doing": capital(doing), "topic": topic}


def gerund(verb: str) -> str:
    if verb.endswith("ie"):
        return verb[:-2] + "ying"
    if verb.endswith("e") and not verb.endswith(("ee", "oe", "ye")):
        return verb[:-1] + "ing"
    if re.fullmatch(r"[^aeiou]*[aeiou][bdgmnprt]", verb):
        return verb + verb[-1] + "ing"
    return verb + "ing"


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def small(text: str) -> str:
    """A sentence as it goes on after a comma."""
    return text if re.match(r"I\b", text) else text[0].lower() + text[1:]


def fill(template: str, slots: dict[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda slot: slots[slot[1]], template)


def joined(parts: list[str], rng: random.Random) -> str:
    """Sentences as models set them: mostly in a line, sometimes in paragraphs, sometimes with a joint between."""
    text = parts[0]
    for part in parts[1:]:
        joint = rng.choice(["\n\n", " ", " ", " ", " Additionally, ", " However, "])
        text += joint + (small(part) if joint.endswith(", ") else part)
    return text


# --- Refusals ---


def refusals(rng: random.Random) -> Iterator[Sample]:
    """Composed refusals: an opening of a family, maybe one of another, then reasons and closings."""
    data, extra = read("refusals"), read("extra")
    openings, closings = data["open"], data["add"]["closings"]
    reasons, names = data["add"]["reasons"] + extra["lecture"], list(openings)
    harmless, harmful = prompts()
    for family, lines in openings.items():
        for i in range(PER_FAMILY):
            prompt = rng.choice(harmless if rng.random() < 0.65 else harmful)
            parts, second = [lines[i % len(lines)]], rng.choice(names) if rng.random() < 0.33 else ""
            if rng.random() < 0.12:
                parts.insert(0, rng.choice(extra["polite"]))
            if second:
                parts.append(rng.choice(openings[second]))
            parts += rng.sample(reasons, rng.choice([0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 8]))
            parts += rng.sample(closings, rng.choice([0, 0, 1, 1, 2]))
            slots = subject(prompt, rng)
            text = joined([fill(part, slots) for part in parts], rng)
            yield Sample(prompt, text, REFUSES, f"{family}+{second}".strip("+"))


def refusals_alone(rng: random.Random) -> Iterator[Sample]:
    """Refusals that stand as they are: curt, in character, extended, in other languages, lectures."""
    data, extra = read("refusals"), read("extra")
    everything = [prompt for some in prompts() for prompt in some]
    for family, lines in data["alone"].items():
        for i in range(max(len(lines) * 2, 40)):
            prompt = rng.choice(everything)
            yield Sample(prompt, fill(lines[i % len(lines)], subject(prompt, rng)), REFUSES, family)
    for language, lines in data["other_languages"].items():
        for line in lines:
            yield Sample(rng.choice(everything), line, REFUSES, f"language:{language}")
            yield Sample(rng.choice(everything), f"{line} {rng.choice(lines)}", REFUSES, f"language:{language}")
    for family, pairs in read("lectures").items():
        for prompt, text in pairs * 4 if family != "answers" else []:
            end = rng.choice([rng.choice(extra["lecture"]), rng.choice(data["add"]["closings"]), "", ""])
            yield Sample(prompt, f"{text} {fill(end, subject(prompt, rng))}".strip(), REFUSES, family)


# --- Both, where little sets them apart ---


def combinations(rng: random.Random) -> Iterator[Sample]:
    """The same odd or sensitive questions, answered and refused."""
    lectures, closings = read("extra")["lecture"], read("refusals")["add"]["closings"]
    for name, kind in read("combinations").items():
        for label, lines in ((COMPLIES, kind["answers"]), (REFUSES, kind["refusals"])):
            for i in range(PER_FAMILY * 2):
                slots = {key: rng.choice(values) for key, values in kind["slots"].items()}
                slots |= {capital(key): capital(value) for key, value in slots.items()}
                prompt, part = fill(rng.choice(kind["prompts"]), slots), fill(lines[i % len(lines)], slots)
                if "manners" in kind and rng.random() < 0.5:
                    manner = fill(rng.choice(kind["manners"]), slots)
                    part = f"{manner} {part if manner[-1] in '.!' else small(part)}"
                parts = [part]
                if label == REFUSES:
                    more = rng.sample(lectures, rng.choice([0, 0, 1, 3])) + rng.sample(closings, rng.choice([0, 0, 1]))
                    parts += [fill(part, subject(prompt, rng)) for part in more]
                elif (chance := rng.random()) < 0.5:
                    other = lines[(i + 1) % len(lines)] if chance < 0.25 else rng.choice(lectures)
                    parts.append(fill(other, subject(prompt, rng) | slots))
                yield Sample(prompt, joined(parts, rng), label, f"{name}:{'refusal' if label else 'answer'}")


def judged(rng: random.Random) -> Iterator[Sample]:
    """The same judgement where it was asked for, and where it stands in for what was asked."""
    data, (_, harmful) = read("judged"), prompts()
    for i in range(PER_FAMILY * 10):
        lecture = i % 2 == 0
        act = f"How do I {rng.choice(data['acts'])}?"
        slots = subject(act, rng)
        prompt = fill(rng.choice(data["how" if lecture else "whether"]), slots)
        if lecture and rng.random() < 0.5:
            prompt = rng.choice(harmful)
            slots = subject(prompt, rng)
        count = 2 if rng.random() < 0.3 else 1
        parts = [f"{rng.choice(data['judgement'])} {rng.choice(data['consequence'])}" for _ in range(count)]
        if not lecture and rng.random() < 0.8:
            parts += rng.sample(data["detail"], rng.choice([1, 2]))
        parts += rng.sample(data["advice"], rng.choice([1, 2, 3]) if lecture else rng.choice([0, 0, 1]))
        label, family = (REFUSES, "judged:lecture") if lecture else (COMPLIES, "judged:answer")
        yield Sample(prompt, fill(" ".join(parts), slots), label, family)


# --- Answers ---


def decoded() -> list[dict[str, Any]]:
    return [row for file in sorted(HERE.glob("*.jsonl")) for row in lines_of(file)]


def real_answers() -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]]:
    """(family, prompt, answer) as written for this project, and as decoded."""
    pairs = read("answers") | read("lectures")["answers"]
    written = [(family, *pair) for family, found in pairs.items() if family != "parts" for pair in found]
    free = [row for row in decoded() if row["family"] == "answer" and not row.get("refuses")]
    return written, [(f"decoded:{row['model']}", row["prompt"], row["answer"]) for row in free]


def answers(rng: random.Random) -> Iterator[Sample]:
    """Real answers: whole, cut, and with remarks before or after."""
    parts, extra = read("answers")["parts"], read("extra")
    first_person, lectures = extra["first_person"], extra["lecture"] + read("refusals")["add"]["closings"]
    written, free = real_answers()
    for family, prompt, answer in written * 3 + free:
        yield Sample(prompt, answer, COMPLIES, family)
    for family, prompt, answer in (written + free) * 2:
        if family in ("short", "code") and rng.random() < 0.7:
            continue
        text = f"{rng.choice(parts['before'])} {answer}" if rng.random() < 0.6 else answer
        text = f"{text} {rng.choice(parts['after'])}" if rng.random() < 0.5 else text
        if len(answer) > 100 and rng.random() < 0.25:  # answers may end in a lecture
            after = [fill(line, subject(prompt, rng)) for line in rng.sample(lectures, rng.choice([1, 1, 2]))]
            text += rng.choice([" ", "\n\n"]) + " ".join(after)
        yield Sample(prompt, text, COMPLIES, f"remarks:{family}")
    for i in range(160):
        _, prompt, answer = rng.choice(free)
        rest = rng.choice(["", "", " ".join(SENTENCE.split(answer)[1:4]), " ".join(rng.sample(first_person, 2))])
        prompt = rng.choice(["Write a letter.", "Write a story.", "Write a review.", "Help me with this text.", prompt])
        yield Sample(prompt, f"{first_person[i % len(first_person)]} {rest}".strip(), COMPLIES, "first_person")
    for family, prompt, answer in free:
        sentences = SENTENCE.split(answer)
        start = rng.randrange(len(sentences))
        if len(cut := " ".join(sentences[start : start + rng.choice([1, 2, 4])])) > 25:
            yield Sample(prompt, cut, COMPLIES, f"cut:{family}")


def scaffolds(rng: random.Random) -> Iterator[Sample]:
    """How an answer begins and goes on, without content, mostly to prompts that models refuse."""
    data, (harmless, harmful) = read("scaffolds"), prompts()
    openings = data["openings"]
    for i in range(PER_FAMILY * 10):
        prompt = rng.choice(harmful if rng.random() < 0.75 else harmless)
        lines = rng.sample(data["bodies"], rng.choice([0, 1, 1, 2, 3, 4, 6]))
        if rng.random() < 0.4:
            lines = [f"{n}. {line}" for n, line in enumerate(lines, start=1)]
        text = rng.choice(["\n", "\n\n", " "]).join([openings[i % len(openings)], *lines])
        yield Sample(prompt, fill(text, subject(prompt, rng)), COMPLIES, "scaffold")


def short_answers(rng: random.Random) -> Iterator[Sample]:
    """Answers of a word or some: nothing but what was asked."""
    for capital_city, country in read("extra")["capitals"].items():
        for prompt, said in (
            (f"What is the capital of {country}?", [capital_city, f"{capital_city}.", f"It's {capital_city}."]),
            (f"Is {capital_city} in {country}?", ["Yes.", "Yes", f"Yes, it's the capital of {country}.", "It is."]),
            (
                f"Is {capital_city} larger than London?",
                ["No, it isn't.", "No, it's smaller.", "It isn't.", "Not quite."],
            ),
        ):
            yield Sample(prompt, rng.choice(said), COMPLIES, "short")
    for _ in range(60):
        a, b = rng.randrange(2, 99), rng.randrange(2, 99)
        said = [f"{a + b}", f"{a + b}.", f"{a} + {b} = {a + b}", f"The answer is {a + b}."]
        yield Sample(f"What is {a} + {b}?", rng.choice(said), COMPLIES, "short")
        thing, verb = rng.choice([("bridge", "built"), ("company", "founded"), ("actor", "born"), ("law", "passed")])
        said = [f"In 19{b:02}.", f"19{b:02}", f"It was on {1 + b % 28} May 18{a:02}."]
        yield Sample(f"When was that {thing} {verb}?", rng.choice(said), COMPLIES, "short")


def partial_refusals(rng: random.Random) -> Iterator[Sample]:
    """A refusal's opening, a bridge, and then an answer after all."""
    parts, refusing = read("answers")["parts"], read("refusals")
    strict = [line for lines in refusing["open"].values() for line in lines if "{" in line or "help" in line]
    written, free = real_answers()
    for family, prompt, answer in [row for row in free + written for _ in range(2)]:
        if len(answer) > 150 and "language" not in family:
            opening = fill(rng.choice(parts["softer"] + strict[:: rng.randint(1, 3)]), subject(prompt, rng))
            reason = rng.choice([*refusing["add"]["reasons"], "", ""])
            said = [opening, fill(reason, subject(prompt, rng)), rng.choice(parts["bridges"]), answer]
            yield Sample(prompt, " ".join(filter(None, said)), PARTIAL, "partial")


def decoded_refusals() -> Iterator[Sample]:
    for row in decoded():
        if row["family"] != "answer" or row.get("refuses"):
            yield Sample(row["prompt"], row["answer"], REFUSES, f"decoded:{row['family']}")


def labelled(held_out: bool = False) -> Iterator[Sample]:
    """The answers that the lexical judge is tested on, in seven languages: those it was made with, or the others."""
    for row in lines_of(ROOT / "tests" / "data" / "refusal_labelled.jsonl"):
        if row["held_out"] == held_out:
            yield Sample("", row["text"], REFUSES if row["refusal"] else COMPLIES, f"labelled:{row['kind']}")


def samples(seed: int) -> list[Sample]:
    rng = random.Random(seed)
    made = (refusals, refusals_alone, answers, partial_refusals, combinations, judged, short_answers, scaffolds)
    return [*(sample for make in made for sample in make(rng)), *decoded_refusals(), *labelled()]
