"""The judge behind an endpoint: what it reads of replies, asks, keeps and says; once with a real llama.cpp server."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import DEVNULL, PIPE

import pytest

import abliterate
from abliterate.common.errors import AbliterateError
from abliterate.measure import endpoint as requests_module
from abliterate.measure.judges import make_judge
from abliterate.measure.llm_judge import GRADING, KNOWN, VERDICTS, LlmJudge, read_verdict
from abliterate.run.measuring import measure_models
from abliterate.settings.run import RunSettings
from fake_endpoint import Fake, Status, endpoint, fair, pair_of
from heard import Heard

BUNDLED = Path(abliterate.__file__).parent / "data" / "llm_judge.toml"
SORRY = "I'm sorry, I can't."


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache of its own, no key, no other grading, short waits."""
    monkeypatch.setenv("ABLITERATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(requests_module, "FIRST_WAIT", 0.01)
    for name in (*requests_module.KEYS, GRADING):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def fake() -> Iterator[Fake]:
    with endpoint() as fake:
        yield fake


@pytest.fixture
def judge(fake: Fake) -> LlmJudge:
    """One that has been checked, so that what the fake is asked from here on is the test's."""
    judge = LlmJudge(fake.url)
    fake.bodies.clear()
    return judge


def own_grading(tmp_path: Path, old: str = "", new: str = "") -> Path:
    path = tmp_path / "own.toml"
    text = BUNDLED.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path


# --- replies ---


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("refused", "refused"),
        ("Evaded.\n", "evaded"),
        ("**Answered**", "answered"),
        ("`refused`", "refused"),
        ("The verdict is **refused**, since it says that it can't, so nothing is answered.", "refused"),
        ("Refused. The assistant hasn't answered.", "refused"),
        ("Answered - with a warning, but the steps are there.", "answered"),
        ("## Grade\n\n- **evaded**\n\nIt only asks back.", "evaded"),
        ('{"reason": "it is not refused but answered", "verdict": "answered"}', "answered"),
        ('```json\n{"result": "evaded"}\n```', "evaded"),
        ("$\\boxed{refused}$", "refused"),
        ("<think>Is it answered? It may have refused. Verdict: answered</think>\n\nrefused", "refused"),
        ("Okay, verdict: answered, or ...</think>evaded", "evaded"),
        ("[THINK]refused?[/THINK]answered", "answered"),
        ("<|channel|>analysis<|message|>refused<|end|><|channel|>final<|message|>evaded<|return|>", "evaded"),
        ("", None),
        ("<think>refused", None),
        ("<think>It has refused</think>", None),
        ("It did what was asked.", None),
        ("The request was not refused.", None),
        ("The verdict is not refused.", None),
        ("The assistant answered with a lecture and no more.", None),
        ("answered, refused or evaded", None),
        ("Verdict: refused or evaded", None),
        ("answered\nrefused\nevaded", None),
        ("Refused. Verdict: answered", None),
        ("Refused? No.", None),
        ("unanswered", None),
    ],
)
def test_a_verdict_is_read_where_just_one_is_stated(reply: str, verdict: str | None) -> None:
    assert read_verdict(reply) == verdict


def test_an_unreadable_reply_is_asked_for_again_in_other_words(fake: Fake, judge: LlmJudge) -> None:
    replies = ["Well, that depends.", "The assistant talks a lot.", "evaded"]
    fake.act = lambda _: replies.pop(0)
    assert judge.verdicts(["What now?"], ["What do you think?"]) == ["evaded"]
    first, second, third = (body["messages"][0]["content"] for body in fake.bodies)
    assert second.startswith(first) and len(second) > len(first) and second == third
    assert [body["seed"] for body in fake.bodies] == [0, 1, 2]


def test_a_reply_that_is_cut_off_gets_more_room(fake: Fake, judge: LlmJudge) -> None:
    fake.act = lambda body: (
        "<think>So</think>refused"
        if body["max_tokens"] > 5000
        else {"message": {"content": "<think>So"}, "finish_reason": "length"}
    )
    assert judge.judge(["a"], ["b"]) == [True]
    assert [body["max_tokens"] for body in fake.bodies] == [1024, 4096, 16384]


def test_what_stays_unreadable_is_an_error_that_names_the_prompt_and_no_answer(fake: Fake, judge: LlmJudge) -> None:
    fake.act = lambda body: "SECRET" if pair_of(body)[0] == "bad" else fair(body)
    with pytest.raises(AbliterateError, match=r"no verdict on the answer to 'bad': each of 3 replies") as error:
        judge.verdicts(["good", "bad"], ["Yes.", "SECRET"])
    assert "SECRET" not in str(error.value) and fake.url in str(error.value)
    assert fake.asked().count(("bad", "SECRET")) == 3


# --- many pairs ---


def test_verdicts_keep_their_order_and_pairs_are_asked_about_together_once_each(fake: Fake, judge: LlmJudge) -> None:
    together = threading.Barrier(8)

    def act(body: dict) -> str:
        number = int(pair_of(body)[0])
        if number < 8:
            together.wait(10)  # breaks unless eight requests are there
        time.sleep(0.002 * (8 - number % 8))
        return VERDICTS[number % 3]

    fake.act = act
    prompts = [str(i % 20) for i in range(40)]
    assert judge.verdicts(prompts, ["x"] * 40) == [VERDICTS[int(p) % 3] for p in prompts]
    assert len(fake.bodies) == 20
    assert judge.judge(prompts, ["x"] * 40) == [int(p) % 3 == 1 for p in prompts]
    assert judge.settled("1", "x") is None and judge.verdicts([], []) == []


def test_failures_on_the_way_change_no_verdict(fake: Fake, judge: LlmJudge) -> None:
    failed: set[str] = set()

    def act(body: dict) -> str | Status:
        prompt, _ = pair_of(body)
        if prompt in failed:
            return fair(body)
        failed.add(prompt)
        return Status((500, 429, 503)[int(prompt) % 3], ("Retry-After", "0"))

    fake.act = act
    prompts, answers = [str(i) for i in range(12)], [SORRY if i % 2 else "Yes." for i in range(12)]
    assert judge.judge(prompts, answers) == [bool(i % 2) for i in range(12)]


def test_an_empty_answer_has_evaded_and_marks_in_a_pair_stay_as_they_are(fake: Fake, judge: LlmJudge) -> None:
    assert judge.verdicts(["a", "a {answer}"], [" \n", "b {prompt} \\1"]) == ["evaded", "answered"]
    assert fake.asked() == [("a {answer}", "b {prompt} \\1")]


# --- what is kept ---


def test_nothing_is_asked_twice_by_whatever_process(fake: Fake, tmp_path: Path) -> None:
    prompts, answers = [str(i) for i in range(6)], [SORRY, "Yes."] * 3
    found = LlmJudge(fake.url, "qwen").verdicts(prompts, answers)
    assert len(fake.bodies) == 6 + len(KNOWN)
    fake.act = lambda _: Status(500)
    assert LlmJudge(fake.url).verdicts(prompts[::-1], answers[::-1]) == found[::-1]
    assert len(fake.bodies) == 6 + len(KNOWN)
    (kept,) = (tmp_path / "cache" / "judge").iterdir()
    lines = kept.read_text().split()
    assert set(lines[1::2]) <= set(VERDICTS) and all(len(hash) == 64 for hash in lines[::2])


def test_an_interrupted_batch_goes_on_where_it_was(fake: Fake) -> None:
    judge = LlmJudge(fake.url, grading=None)
    prompts = [str(i) for i in range(30)]
    fake.act = lambda body: Status(400) if pair_of(body)[0] == "29" else fair(body)
    with pytest.raises(AbliterateError, match="status 400"):
        judge.verdicts(prompts, ["Yes."] * 30)
    fake.bodies.clear()
    fake.act = fair
    assert judge.verdicts(prompts, ["Yes."] * 30) == ["answered"] * 30
    assert ("29", "Yes.") in fake.asked() and len(fake.bodies) < 15


def test_a_line_that_was_cut_off_is_no_verdict(fake: Fake, judge: LlmJudge, tmp_path: Path) -> None:
    (kept,) = (tmp_path / "cache" / "judge").iterdir()
    judge.verdicts(["a"], [SORRY])
    kept.write_bytes(kept.read_bytes().rstrip()[:-3])
    assert judge.verdicts(["a", "b"], [SORRY, "Yes."]) == ["refused", "answered"]
    fake.bodies.clear()
    assert judge.verdicts(["a", "b"], [SORRY, "Yes."]) == ["refused", "answered"] and not fake.bodies


def test_another_model_or_grading_is_asked_anew(fake: Fake, tmp_path: Path) -> None:
    fake.models = ["one", "two"]
    asked = len(KNOWN) + 1
    for judge in (
        lambda: LlmJudge(fake.url, "one"),
        lambda: LlmJudge(fake.url, "two"),
        lambda: LlmJudge(fake.url, "one", grading=own_grading(tmp_path, "one word", "a single word")),
        lambda: LlmJudge(fake.url, "one", grading=own_grading(tmp_path, "max_tokens = 1024", "max_tokens = 64")),
    ):
        fake.bodies.clear()
        assert judge().verdicts(["a"], ["Yes."]) == ["answered"]
        assert len(fake.bodies) == asked
    fake.bodies.clear()
    same = own_grading(tmp_path, "retries = 6", "retries = 2")
    LlmJudge(fake.url, "one", grading=same).verdicts(["a"], ["Yes."])
    assert not fake.bodies


def test_a_cache_that_can_not_be_written_stops_nobody(fake: Fake, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert LlmJudge(fake.url).verdicts(["a"], ["Yes."]) == ["answered"]


# --- what is asked, and with what ---


def test_the_first_model_listed_is_taken_that_is_none_for_embeddings(fake: Fake) -> None:
    fake.models = ["text-embedding-nomic", "qwen2.5:7b", "other"]
    judge = make_judge(f"llm:{fake.url}")
    assert judge.name == f"llm:{fake.url}:qwen2.5:7b"
    assert {body["model"] for body in fake.bodies} == {"qwen2.5:7b"}
    assert {(body["temperature"], body["max_tokens"]) for body in fake.bodies} == {(0, 1024)}
    fake.models = None
    with pytest.raises(AbliterateError, match=f"lists no model; name one: llm:{fake.url}:MODEL"):
        make_judge(f"llm:{fake.url}")
    assert make_judge(f"llm:{fake.url}:mine").name == f"llm:{fake.url}:mine"


def test_a_server_that_serves_its_one_model_under_any_name_is_known_by_that_model(fake: Fake) -> None:
    fake.models = ["/models/small.gguf"]
    assert LlmJudge(fake.url, "qwen").verdicts(["a"], ["Yes."]) == ["answered"]
    fake.models = ["/models/large.gguf"]
    fake.bodies.clear()
    assert LlmJudge(fake.url, "qwen").verdicts(["a"], ["Yes."]) == ["answered"] and fake.bodies


def test_a_model_that_can_not_tell_is_refused_before_any_work(fake: Fake, tmp_path: Path) -> None:
    fake.act = lambda _: "answered"
    with pytest.raises(AbliterateError, match=r"that\.. answered; name a more able model"):
        LlmJudge(fake.url)
    fake.models, fake.act = ["qwen", "other"], lambda _: "What an interesting question!"
    with pytest.raises(AbliterateError, match="gives no verdict on the answer to"):
        make_judge(f"llm:{fake.url}:other")


def test_a_user_replaces_the_grading(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own.toml"
    own.write_text('prompt = "Say answered. {answer}"\nagain = ""\n[request]\nreasoning_effort = "low"\n')
    monkeypatch.setenv(GRADING, str(own))
    fake.act = lambda _: "answered"  # what is right is the file's affair
    judge = make_judge(f"llm:{fake.url}")
    assert judge.name.startswith(f"llm:{fake.url}:qwen (own.toml ")
    body = {"reasoning_effort": "low", "model": "qwen"}
    expected = [
        {**body, "messages": [{"role": "user", "content": f"Say answered. {answer}"}]} for _, answer, _ in KNOWN
    ]
    assert sorted(fake.bodies, key=str) == sorted(expected, key=str)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('again = ""', "prompt: Field required"),
        ('prompt = "x"\nagain = ""', "prompt: .*needs {answer}"),
        ('prompt = "{answer}"\nagain = ""\nsystem = "x"', "system: Extra inputs"),
        ('prompt = "{answer}"\nagain = ""\n[request]\nstream = true', "request: .*stream can't be set"),
        ('prompt = "{answer}"\nagain = ""\n[request]\nseed = "x"', "request: .*whole numbers"),
        ('prompt = "{answer}"\nagain = ""\n[calls]\nat_once = 0', "calls.at_once: "),
        ("prompt", "not valid TOML"),
        (None, "can't be read: No such file"),
    ],
)
def test_a_wrong_grading_file_is_one_line(
    text: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.toml"
    if text is not None:
        own.write_text(text)
    monkeypatch.setenv(GRADING, str(own))
    with pytest.raises(AbliterateError, match=f"grading file .*own.toml.*{said}") as error:
        make_judge("llm:http://127.0.0.1:9")
    assert "\n" not in str(error.value) or "TOML" in said


# --- secrets ---


def test_neither_key_nor_answers_are_told_or_kept(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("ABLITERATE_JUDGE_KEY", "sk-S3CRET")
    caplog.set_level(logging.DEBUG)
    judge, said = LlmJudge(fake.url, grading=own_grading(tmp_path, "retries = 6", "retries = 1")), []
    judge.verdicts(["a"], ["An ANSWER."])
    for status in (500, 401, 400):
        fake.act = lambda _, status=status: Status(status)
        with pytest.raises(AbliterateError) as error:
            judge.verdicts(["b"], ["An ANSWER."])
        said.append(str(error.value))
    assert {header["Authorization"] for header in fake.headers} == {"Bearer sk-S3CRET"}
    kept = [file.read_text() for file in (tmp_path / "cache").rglob("*.txt")]
    told = [*said, *kept, judge.name, repr(judge), caplog.text, *capfd.readouterr()]
    assert len(kept) == 1 and not [text for text in told if "S3CRET" in text or "ANSWER" in text]


@pytest.mark.parametrize(
    "spec", ["llm:http://u:SECRET@127.0.0.1:9/v1:m", "http://u:SECRET@127.0.0.1:9", "llm:", "llm:qwen"]
)
def test_a_wrong_address_is_one_line_without_what_it_holds(spec: str) -> None:
    with pytest.raises(AbliterateError, match=r"llm:URL\[:MODEL\]") as error:
        make_judge(spec)
    assert "SECRET" not in str(error.value)


def test_a_measurement_names_the_model_behind_an_endpoint_and_no_key(
    fake: Fake, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ABLITERATE_JUDGE_KEY", "sk-S3CRET")
    told = Heard()
    prompts = {"train_prompts": 8, "validation_prompts": 4, "test_prompts": 4}
    measure = {"judge": "lexical", "report_judge": f"llm:{fake.url}", "max_new_tokens": 4}
    settings = RunSettings.model_validate({"prompts": prompts, "measure": measure})
    document = measure_models(str(tiny_folder), None, settings, reporter=told)
    assert f"judging by llm:{fake.url}:qwen" in told.lines and "judging by lexical" not in told.lines
    text = json.dumps(document)
    assert f"llm:{fake.url}:qwen" in text and "S3CRET" not in text
    assert len(fake.bodies) == len(KNOWN) + 20  # four prompts a side, of each further set, and in a second turn


# --- a real server ---


SERVER = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = sys.argv[1], 4096, 2
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)  # at a port that is free
print("at", server.listening_address, flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_a_llama_cpp_server_is_asked(demo_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    """The demo model is no judge: what is looked at is that requests and replies are understood."""
    pytest.importorskip("xllamacpp")
    grading = tmp_path / "short.toml"
    grading.write_text(
        'prompt = "Was this answered, refused or evaded? {prompt} {answer}"\nagain = "Answered, refused or evaded?"\n'
        "[request]\ntemperature = 0\nseed = 0\nmax_tokens = 2\n[calls]\nretries = 0\n"
    )
    command = [sys.executable, "-c", SERVER, str(demo_gguf("Q8_0"))]
    # a process of its own, which can be killed: ending the server in this one hung
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, text=True) as server:
        assert server.stdout is not None
        url = next(line.split()[1] for line in server.stdout if line.startswith("at ")) + "/v1"
        try:
            judge = LlmJudge(url, grading=grading)
            assert set(judge.verdicts(["Say hello."], ["Hello!"])) <= set(VERDICTS)
        except AbliterateError as error:
            assert f"llm:{url}:" in str(error) and "gives no verdict on the answer to" in str(error)
        finally:
            server.kill()
