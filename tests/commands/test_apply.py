"""`abliterate apply`: what it says, refuses and plans."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from abliterate.apply.forms import FORMS
from abliterate.apply.hooks import Attachment
from abliterate.commands.apply import EXAMPLES, FORMS_HELP
from abliterate.edit.edit import Edit
from abliterate.edit.recipe import Recipe, save_recipe
from abliterate.edit.stored_tensor import StoredTensor
from abliterate.models.loading import load
from abliterate.models.recipes import recipe_for
from abliterate.models.writers import find_writers
from abliterate.studio.conversation import Conversation, Sampling
from apply.checkpoints import small_recipe, small_shards, write_checkpoint
from command import abliterate, fails, listing, succeeds
from long import LONG
from models import handle_of, save_tiny, tiny_llama


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A current folder with a hand-made model and a recipe for it."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "model", small_shards())
    save_recipe(small_recipe(), tmp_path / "r.safetensors")
    return tmp_path


def test_help_has_every_form_and_an_example_of_each_and_no_torch():
    text = " ".join(abliterate("apply", "--help").out.split())
    for form in FORMS:
        assert f"{form}: " in FORMS_HELP
        assert any(form in name for name in EXAMPLES)
    assert "--norm-preserving" in text
    assert "abliterate apply recipe.safetensors ./model --in-place" in text
    script = "import sys, abliterate.cli; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "[]\n"


def test_examples_are_commands_that_parse(desk):
    for example in EXAMPLES.values():
        arguments = example.split()[1:]
        assert "No such option" not in abliterate(*arguments, "--help").err


def test_checkpoint_is_the_default(desk):
    said = succeeds("apply", "r.safetensors", "model", "--out", "out")
    assert "checkpoint: out" in said.out
    assert "5 writers edited" in said.out
    assert "model-00001-of-00002.safetensors" in listing(desk / "out")
    told = succeeds("apply", "r.safetensors", "model", "--as", "checkpoint", "--out", "two", "--quiet", "--json")
    assert told.err == ""
    assert {"form", "out", "bytes", "writers", "seconds", "notes"} <= set(told.json)
    assert told.json["bytes"] == sum(map(len, listing(desk / "two").values()))
    assert listing(desk / "two") == listing(desk / "out")


def test_strength_scales_the_recipe(desk):
    save_recipe(small_recipe(0.5), desk / "half.safetensors")
    succeeds("apply", "r.safetensors", "model", "--out", "a", "--strength", 0.5, "--quiet")
    succeeds("apply", "half.safetensors", "model", "--out", "b", "--quiet")
    ours, theirs = listing(desk / "a"), listing(desk / "b")
    assert {n for n in ours if ours[n] != theirs[n]} == {"README.md"}  # which says how it was scaled


@pytest.mark.parametrize("strength", [-1.0, -0.25])
def test_a_negative_strength_strengthens(desk, strength):
    """The component along the direction grows by as much as the positive one takes of it."""
    succeeds("apply", "r.safetensors", "model", "--out", "more", f"--strength={strength}", "--quiet")
    recipe = small_recipe()
    r = torch.from_numpy(recipe.edit.directions[0])
    before, after = (load_file(desk / f / "model-00001-of-00002.safetensors")["a.weight"] for f in ("model", "more"))
    wanted = (1 - strength) * (r @ before.float())
    torch.testing.assert_close(r @ after.float(), wanted, atol=0.05, rtol=0.02)


def test_a_shift_in_every_command(tmp_path, monkeypatch):
    """A recipe that only adds: shown, compared, applied at any strength, and live in a chat."""
    monkeypatch.chdir(tmp_path)
    save_tiny("model", tiny_llama(tied=False))
    edit = Edit.shifting(2, torch.randn(32), 3.0)
    edit.save("r.safetensors", model="model")
    assert "1 shift" in succeeds("show", "r.safetensors").out
    (2 * edit).save("twice.safetensors", model="model")
    assert "shifts" in succeeds("diff", "r.safetensors", "twice.safetensors").out
    bias = "model.layers.2.mlp.down_proj.bias"
    for strength, out in ((1.0, "a"), (-0.5, "b")):
        succeeds("apply", "r.safetensors", "model", "--out", out, f"--strength={strength}", "--quiet")
        held = load_file(tmp_path / out / "model.safetensors")
        torch.testing.assert_close(held[bias], strength * torch.from_numpy(edit.shifts[0].vector))
        assert json.loads((tmp_path / out / "config.json").read_text())["mlp_bias"] is True
    handle = load("model", dtype="float32")
    ids = torch.tensor([[5, 9, 17]])
    applied, few = load("b", dtype="float32"), Sampling(max_new_tokens=8)
    with Attachment(handle, edit * -0.5), torch.no_grad():
        live = handle.model(ids).logits
    torch.testing.assert_close(applied.model(ids).logits, live, atol=1e-4, rtol=1e-4)
    talk = Conversation(handle, edit, -0.5, few)
    assert talk.reply("a fox") == Conversation(applied, sampling=few).reply("a fox")
    line = fails(tmp_path, "apply", "r.safetensors", "model", "--as", "adapter", "--out", "l", "--keep-tied")
    assert "keep-tied" in line


def test_the_folder_that_run_wrote_is_a_recipe(desk):
    (desk / "run").mkdir()
    (desk / "r.safetensors").rename(desk / "run" / "recipe.safetensors")
    succeeds("apply", "run", "model", "--out", "out", "--quiet")


def test_in_place_needs_no_out(desk):
    succeeds("apply", "r.safetensors", "model", "--out", "out", "--quiet")
    succeeds("apply", "r.safetensors", "model", "--in-place", "--quiet")
    assert listing(desk / "model") == listing(desk / "out")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--as", "gguff", "--out", "o"], "no form 'gguff'.*checkpoint, adapter, gguf, gguf-adapter, control-vector"),
        (["--as", "hooks", "--out", "o"], "abliterate chat MODEL --recipe"),
        ([], "--out"),
        (["--out", "model"], "is the model itself.*--in-place"),
        (["--as", "adapter", "--in-place"], "--in-place is for the form checkpoint"),
        (["--as", "gguf", "--out", "o"], "is a model folder, not a GGUF; .*--as checkpoint.*abliterate export"),
        (["--as", "gguf-adapter", "--out", "o"], "is a model folder, not a GGUF"),
        (["--as", "gguf", "--plan"], "--plan is for the form checkpoint"),
        (["--out", "o", "--dtype", "float16"], "--dtype"),
        (["--out", ".", "--overwrite"], "recipe r.safetensors lies in"),
    ],
)
def test_what_it_refuses(desk, arguments, says):
    assert re.search(says, fails(desk, "apply", "r.safetensors", "model", *arguments))


def test_a_recipe_that_is_not_there(desk):
    assert "recipe no.safetensors not found" in fails(desk, "apply", "no.safetensors", "model", "--out", "o")


# --- plans ---


def test_a_plan_of_shards_that_are_there_is_what_happens(desk):
    before = listing(desk)
    plan = succeeds("apply", "r.safetensors", "model", "--out", "out", "--plan", "--quiet", "--json").json
    assert listing(desk) == before
    done = succeeds("apply", "r.safetensors", "model", "--out", "out", "--quiet", "--json").json
    assert plan["exact"]
    for key in ("tensors", "writers"):
        assert plan[key] == done[key]
    assert plan["bytes_written"] == done["bytes"]
    assert plan["files"] == 2


def test_a_plan_without_shards_says_what_one_with_them_does(tmp_path):
    handle = handle_of(tiny_llama(tied=True, dtype=torch.bfloat16))
    folder = save_tiny(tmp_path / "model", handle.model)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    handle.model.save_pretrained(folder, max_shard_size=9000)
    save_recipe(recipe_for(Edit.uniform(find_writers(handle), torch.randn(32)), handle), tmp_path / "r.safetensors")
    command = ["apply", tmp_path / "r.safetensors", folder, "--out", tmp_path / "out", "--plan", "--quiet", "--json"]
    there = succeeds(*command).json
    for file in folder.glob("*.safetensors"):
        file.unlink()
    gone = succeeds(*command).json
    assert (there["exact"], gone["exact"]) == (True, False)
    for key in ("bytes_edited", "tensors", "writers", "files"):
        assert gone[key] == there[key], key
    # without them, the shards' headers and the card aren't counted
    assert there["bytes_written"] * 0.7 < gone["bytes_written"] < there["bytes_written"]


LAYERS, WIDTH, INNER, VOCABULARY = 80, 8192, 28672, 128256


def llama_70b(folder):
    """config.json and index of Llama 3 70B, by its shapes, in 30 shards that are not there; bytes in all."""
    kv = WIDTH // 8
    block = {
        "self_attn.q_proj": WIDTH * WIDTH, "self_attn.k_proj": kv * WIDTH, "self_attn.v_proj": kv * WIDTH,
        "self_attn.o_proj": WIDTH * WIDTH, "mlp.gate_proj": INNER * WIDTH, "mlp.up_proj": INNER * WIDTH,
        "mlp.down_proj": INNER * WIDTH, "input_layernorm": WIDTH, "post_attention_layernorm": WIDTH,
    }  # fmt: skip
    sizes = {"model.embed_tokens.weight": VOCABULARY * WIDTH}
    for layer in range(LAYERS):
        sizes |= {f"model.layers.{layer}.{name}.weight": size for name, size in block.items()}
    sizes |= {"model.norm.weight": WIDTH, "lm_head.weight": VOCABULARY * WIDTH}
    total = 2 * sum(sizes.values())
    weight_map = {n: f"model-{1 + i * 30 // len(sizes):05}-of-00030.safetensors" for i, n in enumerate(sizes)}
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "hidden_size": WIDTH,
        "intermediate_size": INNER, "num_attention_heads": 64, "num_key_value_heads": 8, "num_hidden_layers": LAYERS,
        "vocab_size": VOCABULARY, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return total


def recipe_70b():
    entries = {"model.embed_tokens.weight": (StoredTensor("model.embed_tokens.weight", (VOCABULARY, WIDTH), 1),)}
    for layer in range(LAYERS):
        for name, inner in (("self_attn.o_proj", WIDTH), ("mlp.down_proj", INNER)):
            full = f"model.layers.{layer}.{name}.weight"
            entries[full] = (StoredTensor(full, (WIDTH, inner), 0),)
    edit = Edit.from_names(dict.fromkeys(entries, 1.0), torch.randn(WIDTH))
    about = {"tied": False, "embedding": "model.embed_tokens.weight", "head": "lm_head.weight"}
    return Recipe(edit, about, {}, entries)


def check_70b(tmp_path, recipe):
    total = llama_70b(tmp_path / "llama")
    save_recipe(recipe, tmp_path / "r.safetensors")
    assert (tmp_path / "r.safetensors").stat().st_size < 2 * 2**20
    command = ["apply", tmp_path / "r.safetensors", tmp_path / "llama", "--out", tmp_path / "out", "--plan", "--quiet"]
    before = listing(tmp_path)
    plan = succeeds(*command, "--json").json
    assert listing(tmp_path) == before
    config = (tmp_path / "llama" / "config.json").stat().st_size
    index = (tmp_path / "llama" / "model.safetensors.index.json").stat().st_size
    assert total == 141_107_412_992  # what the real index says
    assert plan["bytes_read"] == plan["bytes_written"] == total + config + index
    assert plan["bytes_edited"] == 2 * (VOCABULARY * WIDTH + LAYERS * WIDTH * (WIDTH + INNER))
    assert (plan["tensors"], plan["writers"], plan["files"]) == (161, 161, 30)
    assert plan["memory_bytes"] > 0
    assert plan["seconds"] > 0
    return plan, command


def test_a_70b_model_is_planned_from_its_index_alone(tmp_path):
    plan, command = check_70b(tmp_path, recipe_70b())
    text = succeeds(*command).out
    assert "131.4" in text  # GiB
    assert "161 tensors of 161 writers" in text
    largest_tensor = 2 * VOCABULARY * WIDTH
    assert plan["memory_bytes"] < 3 * largest_tensor + 400e6


@LONG
@pytest.mark.slow
def test_a_70b_model_is_planned_by_its_skeleton(tmp_path):
    """A recipe that names parameters and nothing else."""
    check_70b(tmp_path, Recipe(recipe_70b().edit))


def test_a_tied_model_is_planned_with_its_head(tmp_path):
    llama_70b(tmp_path / "llama")
    path = tmp_path / "llama" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["lm_head.weight"]
    path.write_text(json.dumps(index))
    save_recipe(recipe_70b(), tmp_path / "r.safetensors")
    command = ["apply", tmp_path / "r.safetensors", tmp_path / "llama", "--plan", "--quiet", "--json"]
    plan, kept = succeeds(*command).json, succeeds(*command, "--keep-tied").json
    assert plan["bytes_written"] - plan["bytes_read"] == 2 * VOCABULARY * WIDTH
    assert kept["bytes_written"] == kept["bytes_read"]


def test_a_plan_needs_something_to_go_by(tmp_path, desk):
    for file in (desk / "model").glob("*.safetensors*"):
        file.unlink()
    assert "their index" in fails(desk, "apply", "r.safetensors", "model", "--plan")
