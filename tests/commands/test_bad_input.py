"""What users get wrong: one line that says what, where and what to do; an exit code; nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from abliterate.common.files import host_tag
from command import SMALL, abliterate, fails, listing, succeeds
from models import save_tiny, tiny, tiny_llama, tiny_tokenizer

SHORTEST = ["--no-filter", "--method", "article", "--candidates", "1", *SMALL]
RUN = ["--out", "out", *SHORTEST]
OWN = ["--out", "out", "--no-filter", "--train-prompts", "8", "--test-prompts", "8", "--max-new-tokens", "8"]
GOOD = [f"Tell me fact number {i} please" for i in range(24)]
BAD = [f"Do the bad thing number {i} now" for i in range(24)]


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def copy(desk, tiny_folder):
    """A copy of the tiny model to damage."""
    return Path(shutil.copytree(tiny_folder, desk / "copy"))


def change_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# --- the model ---


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("org/no-such-model", "the Hub doesn't know it or can't be reached"),
        ("no-such-model", "no such folder here"),
        ("./no-such-folder", "no such file or folder"),
        ("no-such.gguf", "no such file or folder"),
        ("not a valid id", "not found"),
        ("", "name is empty"),
    ],
)
@pytest.mark.parametrize("command", [["run", *RUN], ["inspect"]], ids=["run", "inspect"])
def test_unknown_model(desk, model, said, command):
    line = fails(desk, command[0], model, *command[1:])
    assert model in line
    assert said in line


def test_folder_without_config(desk):
    (desk / "empty").mkdir()
    assert "empty can't be loaded: there is no config.json in it" in fails(desk, "run", "empty", *RUN)


def test_file_that_is_no_model(desk):
    (desk / "model.bin").write_bytes(b"x")
    assert "is a file, but not a .gguf" in fails(desk, "run", "model.bin", *RUN)


@pytest.mark.parametrize("config", ["{nonsense", "{}", '{"model_type": "zork"}'])
def test_config_that_says_nothing(desk, copy, config):
    (copy / "config.json").write_text(config)
    assert "model copy can't be loaded" in fails(desk, "run", "copy", *RUN)


def test_pickles_are_refused(desk, copy):
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    line = fails(desk, "run", "copy", *RUN)
    assert "pytorch_model.bin" in line
    assert "convert them to safetensors" in line


def test_no_weights(desk, copy):
    (copy / "model.safetensors").unlink()
    assert "there are no weights" in fails(desk, "run", "copy", *RUN)


def test_weights_cut_short(desk, copy):
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    line = fails(desk, "run", "copy", *RUN)
    assert "a safetensors file is damaged" in line
    assert "get it again" in line


def test_missing_weight_is_not_drawn_at_random(desk, copy):
    change_weights(copy, lambda weights: weights.pop("model.layers.1.mlp.down_proj.weight"))
    assert "lack weight model.layers.1.mlp.down_proj.weight" in fails(desk, "run", "copy", *RUN)


def test_weight_of_another_shape(desk, copy):
    change_weights(copy, lambda weights: weights.update({"model.layers.1.mlp.down_proj.weight": torch.zeros(3, 3)}))
    assert "other shapes than config.json says" in fails(desk, "run", "copy", *RUN)


@pytest.mark.parametrize("broken", ["missing", "damaged"])
def test_tokenizer(desk, copy, broken):
    if broken == "damaged":
        (copy / "tokenizer.json").write_text("{}")
    else:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (copy / name).unlink()
    line = fails(desk, "run", "copy", *RUN)
    assert "tokenizer of model copy can't be loaded" in line
    assert "get its files" in line


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_non_finite_weight_is_named(desk, copy, value, dtype):
    change_weights(copy, lambda weights: weights["model.layers.2.mlp.down_proj.weight"][3].fill_(value))
    line = fails(desk, "run", "copy", *RUN, "--dtype", dtype)
    assert "weight model.layers.2.mlp.down_proj.weight holds NaN or infinite values" in line


@pytest.mark.parametrize("scale", [1e25, 3e38])
def test_non_finite_activation_names_the_layer(desk, copy, scale):
    change_weights(copy, lambda weights: weights["model.layers.2.mlp.down_proj.weight"].fill_(scale))
    assert "activation after layer 2" in fails(desk, "run", "copy", *RUN)
    assert "activation after layer 2" in fails(desk, "inspect", "copy")


def test_half_precision_overflow_says_which_dtype_to_take(desk, copy):
    change_weights(copy, lambda weights: weights["model.layers.1.mlp.down_proj.weight"].fill_(6e4))
    line = fails(desk, "run", "copy", *RUN, "--dtype", "float16")
    assert "activation after layer 1" in line
    assert "--dtype float32" in line


def test_other_kinds_of_model(desk):
    from transformers import BertConfig, BertForSequenceClassification, BertModel, T5Config, T5ForConditionalGeneration

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    for model in (
        T5ForConditionalGeneration(T5Config(vocab_size=400, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)),
        BertForSequenceClassification(BertConfig(vocab_size=400, **sizes)),
        BertModel(BertConfig(vocab_size=400, **sizes)),
    ):
        name = type(model).__name__
        save_tiny(desk / name, model)
        line = fails(desk, "run", name, *RUN)
        assert f"is {name}, not a causal language model" in line


def test_no_chat_template(desk):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    save_tiny(desk / "plain", tokenizer=tokenizer)
    assert "no chat template; pass --chat-template" in fails(desk, "run", "plain", *RUN)
    succeeds("run", "plain", *RUN, "--chat-template", "chatml")
    assert (desk / "out" / "results.json").is_file()


@pytest.mark.parametrize("template", ["no-such-file.jinja", "{% for %}"])
def test_bad_chat_template(desk, tiny_folder, template):
    assert "chat template" in fails(desk, "run", tiny_folder, *RUN, "--chat-template", template)


# --- the prompts ---


def texts(prompts) -> bytes:
    return "\n".join(prompts).encode()


@pytest.mark.parametrize(
    ("name", "content", "more", "said"),
    [
        ("empty.txt", b"", [], ["empty.txt is empty", "put at least 8 prompts into it"]),
        ("blank.jsonl", b"\n\n", [], ["blank.jsonl is empty"]),
        ("few.txt", texts(BAD[:7]), [], ["few.txt has 7 different prompts", "at least 8"]),
        ("again.txt", texts(BAD[:1] * 9), [], ["again.txt has 1 different prompt"]),
        (
            "goals.csv", b"aim,target\n" + b"\n".join(f"{b},ok".encode() for b in BAD), ["--target-column", "text"],
            ["goals.csv has no column 'text' (it has: 'aim', 'target')", "--target-column"],
        ),
        ("aims.csv", b"aim\n" + texts(BAD), [], ["no column with a usual name", "'aim'", "--target-column"]),
        ("latin.txt", "\n".join(f"é {b}" for b in BAD).encode("latin-1"), [], ["not UTF-8", "line 1", "save it as"]),
        ("cut.jsonl", b'{"text": "a"}\n{"text": ', [], ["cut.jsonl, line 2", "not valid JSON"]),
        ("odd.docx", texts(BAD), [], ["odd.docx is of no known kind"]),
        ("shared.txt", texts([*BAD, GOOD[5].upper() + "!"]), [], [GOOD[5], "on both sides", "keep it on one"]),
        (
            "splits.jsonl",
            "\n".join(json.dumps({"text": b, "split": s}) for s in ("train", "test") for b in BAD).encode(), [],
            ["is in two splits, 'train' and 'test'", BAD[0]],
        ),
        ("long.txt", texts([*BAD, "long " * 900]), [], ["'long long", "tokens and the context", "shorten the prompt"]),
    ],
)  # fmt: skip
def test_prompts(desk, tiny_folder, name, content, more, said):
    (desk / "good.txt").write_bytes(texts(GOOD))
    (desk / name).write_bytes(content)
    line = fails(desk, "run", tiny_folder, "--target", name, "--baseline", "good.txt", *OWN, *more)
    for part in said:
        assert part in line


def test_missing_prompts(desk, tiny_folder):
    line = fails(desk, "run", tiny_folder, "--target", "no-such.txt", "--baseline", "bundled", *OWN)
    assert "prompt file no-such.txt was not found" in line
    line = fails(desk, "run", tiny_folder, "--target", "bundled", "--baseline", "org/no-such-set", *OWN)
    assert "data set org/no-such-set" in line


@pytest.mark.slow
def test_prompt_that_leaves_little_room_for_an_answer(desk):
    """Learned position embeddings have no row past the context: there the answer ends, not the run."""
    save_tiny(desk / "gpt2", tiny("gpt2", n_layer=3, n_embd=32, n_head=4, n_positions=160))
    (desk / "bad.txt").write_bytes(texts(f"{b}: {'explain all of this very slowly ' * 7}" for b in BAD))
    (desk / "good.txt").write_bytes(texts(GOOD))
    succeeds("run", "gpt2", "--target", "bad.txt", "--baseline", "good.txt", "--method", "sweep", *OWN[:-1], "100")


# --- the output ---


def test_output_not_empty_unless_overwritten(desk, tiny_folder):
    (desk / "out").mkdir()
    (desk / "out" / "notes.txt").write_text("mine")
    line = fails(desk, "run", tiny_folder, *RUN)
    assert "out is not empty" in line
    assert "--overwrite" in line
    succeeds("run", tiny_folder, *RUN, "--overwrite")
    written = ["model", "recipe.safetensors", "report-data.json", "report.html", "results.json"]
    assert sorted(p.name for p in (desk / "out").iterdir()) == written
    assert [p.name for p in desk.iterdir()] == ["out"]


def test_failed_overwrite_keeps_the_old(desk, tiny_folder):
    (desk / "out").mkdir()
    (desk / "out" / "notes.txt").write_text("mine")
    fails(desk, "run", tiny_folder, "--out", "out", "--overwrite", *SMALL, code=3)


def test_output_must_not_hold_the_model(desk, copy):
    line = fails(desk, "run", "copy", "--overwrite", *SHORTEST, "--out", "copy")
    assert "output folder copy holds copy" in line


@pytest.mark.parametrize("out", [".", "..", "../here", "file.txt", "file.txt/below"])
def test_output_that_cannot_be(desk, tiny_folder, monkeypatch, out):
    (desk / "here").mkdir()
    monkeypatch.chdir(desk / "here")
    (desk / "here" / "file.txt").write_text("mine")
    assert "--out" in fails(desk, "run", tiny_folder, "--overwrite", *SHORTEST, "--out", out)


def test_folders_made_for_a_failed_output_go_too(desk, tiny_folder, monkeypatch):
    no_space(monkeypatch)
    fails(desk, "run", tiny_folder, *SHORTEST, "--out", "deep/down/out")


@pytest.mark.parametrize("command", ["collect", "measure"])
def test_output_file(desk, tiny_folder, command):
    (desk / "folder").mkdir()
    (desk / "there.json").write_text("mine")
    arguments = [command, tiny_folder, *SMALL[:4], "--out"]
    assert "is a folder; name a file" in fails(desk, *arguments, "folder", "--overwrite")
    assert "there.json exists" in fails(desk, *arguments, "there.json")
    assert "there.json is a file" in fails(desk, *arguments, "there.json/below")


def test_disk_too_small_is_seen_before_the_work(desk, tiny_folder, monkeypatch):
    usage = shutil.disk_usage(desk)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    line = fails(desk, "run", tiny_folder, *RUN)
    assert "output out needs" in line
    assert "free some" in line


def no_space(monkeypatch, error: Exception | None = None) -> None:
    from abliterate.apply.checkpoint import form

    def full(*_args, **_options):
        raise error or OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(form, "run_pieces", full)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_disk_full_while_saving(desk, tiny_folder, monkeypatch, error):
    no_space(monkeypatch, error)
    assert "the disk is full; out was not written" in fails(desk, "run", tiny_folder, *RUN)


@pytest.mark.slow
def test_disk_full_while_saving_the_recipe(desk, tiny_folder, monkeypatch):
    import safetensors.numpy
    import safetensors.torch

    def full(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)  # of recipes
    monkeypatch.setattr(safetensors.torch, "save_file", full)  # of activations
    assert "the disk is full; out was not written" in fails(desk, "run", tiny_folder, *RUN)
    line = fails(desk, "collect", tiny_folder, "--no-filter", *SMALL[:4], "--out", "acts.safetensors")
    assert "the disk is full; acts.safetensors was not written" in line


# --- the options ---


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--layers", "x"], ["layers 'x' should look like 4-24"]),
        (["--layers", "3-1"], ["run backwards"]),
        (["--layers", "0-99"], ["--layers 0-99", "layers 0 to 3"]),
        (["--method", "sweep", "--layers", "3"], ["no layer left to search", "widen --layers"]),
        (["--dtype", "int3"], ["load.dtype = 'int3'", "'float32'"]),
        (["--judge", "oracle"], ["unknown judge 'oracle'", "lexical"]),
        (["--judge", "classifier:no-such-folder"], ["no-such-folder", "can't be loaded"]),
        (["--judge", "llm:http://127.0.0.1:9/v1:x"], ["http://127.0.0.1:9/v1 doesn't answer", "server"]),
        (["--method", "magic"], ["search.method = 'magic'", "'article'"]),
        (["--winsorise", "3"], ["collect.winsorise = 3.0", "less than 1"]),
        (["--train-prompts", "2"], ["prompts.train_prompts = 2", "8"]),
        (["--positions", "50"], ["31 tokens", "50 positions"]),
        (["--config", "no-such.toml"], ["settings file no-such.toml not found"]),
        (["--activations", "no-such.safetensors"], ["no-such.safetensors not found", "abliterate collect"]),
        (["--method", "sweep", "--interactive"], ["--method article"]),
    ],
)
def test_options(desk, tiny_folder, options, said):
    line = fails(desk, "run", tiny_folder, *RUN, *options)
    for part in said:
        assert part in line


@pytest.mark.parametrize(
    ("content", "said"),
    [("a = [", "not valid TOML"), ("[search]\nzork = 1", "search.zork"), ("search = 1", "search")],
)
def test_settings_file(desk, tiny_folder, content, said):
    (desk / "settings.toml").write_text(content)
    assert said in fails(desk, "run", tiny_folder, *RUN, "--config", "settings.toml", "--layers", "1-2")


def test_unknown_option_and_command(desk):
    assert abliterate("run", "model", "--zork").code == 2
    assert abliterate("zork").code == 2


def test_interactive_needs_a_terminal(desk, tiny_folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115
    line = fails(desk, "run", tiny_folder, *RUN, "--method", "article", "--interactive")
    assert "--interactive needs a terminal" in line


def test_activations_of_another_model(desk, tiny_folder):
    save_tiny(desk / "other", tiny_llama(layers=3))
    succeeds("collect", "other", "--out", "acts.safetensors", "--no-filter", *SMALL[:6])
    line = fails(desk, "run", tiny_folder, *RUN, "--activations", "acts.safetensors")
    assert "acts.safetensors was made with other" in line


def test_damaged_activations(desk, tiny_folder):
    (desk / "acts.safetensors").write_bytes(b"nothing")
    assert "damaged" in fails(desk, "run", tiny_folder, *RUN, "--activations", "acts.safetensors")


def test_original_with_another_tokenizer(desk, tiny_folder):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "answer")
    save_tiny(desk / "other", tokenizer=tokenizer)
    line = fails(desk, "measure", "other", "--original", tiny_folder, *SMALL[:4], *SMALL[8:])
    assert "other reads the prompts as other tokens" in line


# --- nothing to do ---


def test_model_that_does_not_refuse(desk, tiny_folder):
    line = fails(desk, "run", tiny_folder, "--out", "out", *SMALL, code=3)
    assert "0 of 8 target prompts" in line
    assert "95% interval 0% to 32%" in line
    assert "--force" in line


# --- interruptions, in a process of their own ---


def start(desk: Path, *arguments: object) -> subprocess.Popen[str]:
    """A run that is in the middle of measuring the edited model: its temporary folder exists."""
    long = ["--test-prompts", "64", "--max-new-tokens", "150"]
    process = subprocess.Popen(
        [sys.executable, "-m", "abliterate.cli", *map(str, arguments), *long],
        cwd=desk, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in the background
    )  # fmt: skip
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if "edited: answers" in line:
            time.sleep(0.1)
            return process
    raise AssertionError("".join(seen))


@pytest.mark.slow
def test_ctrl_c_leaves_nothing(desk, tiny_folder):
    process = start(desk, "run", tiny_folder, *RUN)
    there = {".out.progress.json", f".out.{host_tag()}-{process.pid}.tmp"}
    assert {p.name for p in desk.iterdir()} - {".out.progress.json.tmp"} == there
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert err.splitlines()[-1] == "abliterate: interrupted; nothing half-written is left"
    assert "Traceback" not in err
    assert listing(desk) == {}


@pytest.mark.slow
def test_kill_leaves_nothing_under_the_final_name(desk, tiny_folder):
    process = start(desk, "run", tiny_folder, *RUN)
    process.kill()
    process.communicate(timeout=60)
    assert not (desk / "out").exists()
    succeeds("run", tiny_folder, *RUN)
    assert (desk / "out" / "results.json").is_file()
