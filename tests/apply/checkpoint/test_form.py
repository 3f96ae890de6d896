"""A checkpoint edited on disk is the model edited in memory, and all the rest of it is the same bytes."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from abliterate.apply.checkpoint import blocks, pieces
from abliterate.apply.removal import removed
from abliterate.apply.weights import bake
from abliterate.common.errors import AbliterateError, ModelError, NonFiniteError, OutputError, RecipeError, WriterError
from abliterate.edit.algebra import factors
from abliterate.edit.edit import Edit, orthonormal
from abliterate.models.folders import local_folder
from abliterate.models.recipes import recipe_for
from abliterate.models.shards import read_shard
from abliterate.models.writers import find_writers
from apply.checkpoints import D_MODEL, ENTRIES, apply_to, small_recipe, small_shards, write_checkpoint
from command import listing
from models import FAMILIES, cast, handle_of, save_tiny, tiny_llama

IDS = torch.tensor([[5, 17, 300, 42, 7, 99, 250, 8, 8, 31], [9, 1, 1, 377, 20, 4, 6, 8, 210, 30]])


def tensors_of(folder):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def expected(tensors, recipe):
    """What the recipe makes of `small_shards`, tensor by tensor, by the arithmetic in memory."""
    new = dict(tensors)
    for writer, part in recipe.edit.parts.items():
        for entry in ENTRIES[writer]:
            gain = tensors[entry.gain.name].double() + entry.gain.plus if entry.gain else None
            new[entry.name] = removed(tensors[entry.name], factors(part, gain), entry.axis)
    return new


def saved(tmp_path, model, **options):
    folder = tmp_path / "model"
    save_tiny(folder, model)
    if options:
        for file in folder.glob("*.safetensors"):
            file.unlink()
        model.save_pretrained(folder, **options)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_loads_what_baking_gives(tmp_path, family):
    handle = handle_of(FAMILIES[family]())
    folder = saved(tmp_path, handle.model)
    edit = Edit.uniform(find_writers(handle), torch.randn(handle.d_model))
    before = handle.model(IDS).logits
    summary = apply_to(recipe_for(edit, handle), folder, tmp_path / "out")
    edit.bake(handle)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (handle.model(IDS).logits - before).abs().max() > 1e-2
    torch.testing.assert_close(again(IDS).logits, handle.model(IDS).logits, atol=2e-5, rtol=1e-5)
    assert summary["writers"] == len(find_writers(handle))


@pytest.mark.parametrize("family", ["gemma3_text", "olmo2", "gpt2"])
def test_the_same_of_many_shards_for_a_plane_with_gains_in_other_shards(tmp_path, family):
    handle = handle_of(FAMILIES[family]())
    folder = saved(tmp_path, handle.model, max_shard_size=9000)
    assert len(list(folder.glob("*.safetensors"))) > 3
    found = find_writers(handle)
    edit = Edit(tuple(w.name for w in found), orthonormal(torch.randn(2, 32)), torch.rand(len(found), 2))
    apply_to(recipe_for(edit, handle), folder, tmp_path / "out")
    edit.bake(handle)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(again(IDS).logits, handle.model(IDS).logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("strength", "directions"), [(1.0, 1), (-0.4, 2)])
def test_every_stored_tensor_is_what_memory_gives(tmp_path, dtype, strength, directions):
    folder = write_checkpoint(tmp_path / "model", small_shards(dtype))
    recipe = small_recipe(strength, directions)
    summary = apply_to(recipe, folder, tmp_path / "out")
    old, new = tensors_of(folder), tensors_of(tmp_path / "out")
    wanted = expected(old, recipe)
    changed = {e.name for entries in ENTRIES.values() for e in entries}
    assert (summary["writers"], summary["tensors"]) == (5, len(changed))
    for name in old:
        assert new[name].dtype == old[name].dtype
        if name in changed:
            assert not torch.equal(new[name], old[name]), name
            torch.testing.assert_close(new[name], wanted[name], rtol=2 * torch.finfo(dtype).eps, atol=1e-5, msg=name)
        else:
            assert torch.equal(new[name], old[name]), name


def test_what_is_not_edited_stays_byte_for_byte(tmp_path):
    folder = write_checkpoint(tmp_path / "model", small_shards())
    (folder / "tokenizer.json").write_bytes(os.urandom(100))
    (folder / "sub").mkdir()
    (folder / "sub" / "chat_template.jinja").write_text("x")
    recipe = small_recipe()
    only_a = Edit.from_names({"a": 1.0}, recipe.edit.directions[0])
    recipe.edit = only_a
    apply_to(recipe, folder, tmp_path / "out")
    before, after = listing(folder), listing(tmp_path / "out")
    assert set(after) == set(before) | {"README.md"}
    first, second = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    assert {n for n in before if after[n] != before[n]} == {first}
    shard = read_shard(folder / first)
    assert read_shard(tmp_path / "out" / first).header == shard.header
    data = bytearray(after[first])
    for name in ("a.weight", "a.bias"):
        place = shard.tensors[name]
        data[place.start : place.end] = before[first][place.start : place.end]
    assert bytes(data) == before[first]
    assert after[second] == before[second]


def test_small_pieces_give_the_same_bytes(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path / "model", small_shards(torch.float32))
    for name, options in (("plain", {}), ("norms", {"norm_preserving": True})):
        apply_to(small_recipe(), folder, tmp_path / f"{name}-whole", **options)
    monkeypatch.setattr(pieces, "EDITED", 100)
    monkeypatch.setattr(blocks, "BLOCK", 20)
    for name, options in (("plain", {}), ("norms", {"norm_preserving": True})):
        apply_to(small_recipe(), folder, tmp_path / f"{name}-parts", **options)
        whole, parts = (tensors_of(tmp_path / f"{name}-{how}") for how in ("whole", "parts"))
        for tensor in whole:
            torch.testing.assert_close(parts[tensor], whole[tensor], atol=1e-6, rtol=1e-5)


# --- tied embeddings ---


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": 9000}])
def test_a_tied_head_is_written_as_its_own_tensor(tmp_path, shards):
    handle = handle_of(tiny_llama(tied=True, dtype=torch.bfloat16))
    folder = saved(tmp_path, handle.model, **shards)
    edit = Edit.uniform(find_writers(handle), torch.randn(32))
    summary = apply_to(recipe_for(edit, handle), folder, tmp_path / "out")
    assert summary["untied"]
    old, new = tensors_of(folder), tensors_of(tmp_path / "out")
    assert set(new) == set(old) | {"lm_head.weight"}
    assert torch.equal(new["lm_head.weight"], old["model.embed_tokens.weight"])
    assert not torch.equal(new["model.embed_tokens.weight"], old["model.embed_tokens.weight"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {**json.loads((folder / "config.json").read_text()), "tie_word_embeddings": False}
    files = {p.name for p in folder.glob("*.safetensors")}
    assert {p.name for p in (tmp_path / "out").glob("*.safetensors")} == files
    if shards:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in new.values())
        for name, file in index["weight_map"].items():
            with safe_open(tmp_path / "out" / file, "pt") as shard:
                assert name in shard.keys()  # noqa: SIM118
                assert shard.metadata() == {"format": "pt"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    edit.bake(handle)
    torch.testing.assert_close(again(IDS).logits, handle.model(IDS).logits, atol=0.05, rtol=0.05)


def test_keep_tied_edits_the_one_tensor(tmp_path):
    handle = handle_of(tiny_llama(tied=True))
    folder = saved(tmp_path, handle.model)
    edit = Edit.uniform(find_writers(handle), torch.randn(32))
    summary = apply_to(recipe_for(edit, handle), folder, tmp_path / "out", keep_tied=True)
    assert not summary["untied"]
    assert set(tensors_of(tmp_path / "out")) == set(tensors_of(folder))
    bake(handle, edit, keep_tied=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(again(IDS).logits, handle.model(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("keep_tied", [False, True])
def test_a_tied_head_that_was_saved_too(tmp_path, keep_tied):
    """Old versions of transformers and some merging tools write both."""
    handle = handle_of(tiny_llama(tied=True))
    folder = saved(tmp_path, handle.model)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit = Edit.uniform(find_writers(handle), torch.randn(32))
    apply_to(recipe_for(edit, handle), folder, tmp_path / "out", keep_tied=keep_tied)
    bake(handle, edit, keep_tied=keep_tied)
    new = tensors_of(tmp_path / "out")
    assert torch.equal(new["lm_head.weight"], tensors["lm_head.weight"]) != keep_tied
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(again(IDS).logits, handle.model(IDS).logits, atol=1e-5, rtol=1e-5)


def test_a_tied_embedding_that_the_edit_leaves_alone_stays_tied(tmp_path):
    handle = handle_of(tiny_llama(tied=True))
    folder = saved(tmp_path, handle.model)
    edit = Edit.uniform(find_writers(handle, range(4)), torch.randn(32))
    assert not apply_to(recipe_for(edit, handle), folder, tmp_path / "out")["untied"]
    assert (tmp_path / "out" / "config.json").read_bytes() == (folder / "config.json").read_bytes()


# --- norms and shifts ---


@pytest.mark.parametrize("family", ["llama_untied_biases", "gpt2", "gemma3_text"])
def test_norm_preserving_keeps_norms_and_takes_the_direction_out(tmp_path, family):
    handle = handle_of(FAMILIES[family]())
    folder = saved(tmp_path, handle.model)
    found = find_writers(handle)
    edit = Edit.uniform(found, torch.randn(32))
    recipe = recipe_for(edit, handle)
    old = {name: p.double() for name, p in handle.model.named_parameters()}
    plain = handle_of(FAMILIES[family]())
    bake(plain, edit)
    apply_to(recipe, folder, tmp_path / "out", norm_preserving=True)
    bake(handle, edit, norm_preserving=True)
    new = {name: p.double() for name, p in handle.model.named_parameters()}
    for writer in found:
        was, now = (t[writer.name].movedim(writer.axis, 0) for t in (old, new))
        torch.testing.assert_close(now.norm(dim=0), was.norm(dim=0), rtol=1e-5, atol=0)
        r = torch.from_numpy(factors(edit.parts[writer.name], writer.gain).right[0]).double()
        assert (r @ now).norm() < 1e-5 * (r @ was).norm()
        assert not torch.allclose(now, plain.model.get_parameter(writer.name).double().movedim(writer.axis, 0))
        if writer.bias:
            assert torch.equal(new[writer.bias], plain.model.get_parameter(writer.bias).double())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(again(IDS).logits, handle.model(IDS).logits, atol=2e-5, rtol=1e-5)


def test_a_column_that_was_all_direction_is_not_blown_up(tmp_path):
    shards = small_shards(torch.float32)
    recipe = small_recipe()
    weight = shards["model-00001-of-00002.safetensors"]["a.weight"]
    weight[:, 0] = 5 * torch.from_numpy(recipe.edit.directions[0])
    folder = write_checkpoint(tmp_path / "model", shards)
    apply_to(recipe, folder, tmp_path / "out", norm_preserving=True)
    new = tensors_of(tmp_path / "out")["a.weight"]
    assert new[:, 0].norm() < 1e-5
    torch.testing.assert_close(new[:, 1:].norm(dim=0), weight[:, 1:].norm(dim=0))


def test_a_shift_goes_into_the_bias(tmp_path):
    handle = handle_of(FAMILIES["starcoder2"]())
    folder = saved(tmp_path, handle.model)
    r = torch.randn(32)
    found = find_writers(handle)
    edit = Edit.uniform(found, r) + Edit.shifting(2, torch.randn(32), 3.0)
    apply_to(recipe_for(edit, handle), folder, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with edit.attached(handle):
        torch.testing.assert_close(again(IDS).logits, handle.model(IDS).logits, atol=2e-5, rtol=1e-5)


def test_a_shift_without_a_bias_says_which_forms_can(tmp_path):
    handle = handle_of(FAMILIES["mistral"]())
    folder = saved(tmp_path, handle.model)
    with pytest.raises(WriterError, match=r"block 1 .*control-vector"):
        apply_to(recipe_for(Edit.shifting(1, torch.eye(32)[0], 2.0), handle), folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["llama", "cohere"])
@pytest.mark.parametrize("shards", ["one file", "several"])
def test_a_shift_goes_into_a_bias_that_the_config_gives_the_class(tmp_path, family, shards):
    """With a removal that unties the embedding: three changes to the config, the header and the index at once."""
    handle = handle_of(cast(FAMILIES[family](), torch.bfloat16))
    options = {} if shards == "one file" else {"max_shard_size": "20KB"}
    folder = saved(tmp_path, handle.model, **options)
    edit = Edit.uniform(find_writers(handle), torch.randn(32), 0.5) + Edit.shifting(2, torch.randn(32), 3.0)
    recipe = recipe_for(edit, handle)
    summary = apply_to(recipe, folder, tmp_path / "out")
    assert any("is zero" in note or "all but 1 of them zero" in note for note in summary["notes"])
    before, after = tensors_of(folder), tensors_of(tmp_path / "out")
    new = {name: t for name, t in after.items() if name not in before and name != "lm_head.weight"}
    assert new and all(name.endswith(".bias") and t.dtype == torch.bfloat16 for name, t in new.items())
    assert sum(bool(t.any()) for t in new.values()) == 1
    if shards == "several":
        index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(after)
    with edit.attached(handle):
        live = handle.model(IDS).logits.float()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert (again(IDS).logits - live).abs().max() < 0.05 * live.abs().max()
    # in place, the same bytes
    inside = tmp_path / "inside"
    shutil.copytree(folder, inside)
    apply_to(recipe, inside, inside, in_place=True)
    found = tensors_of(inside)
    assert set(found) == set(after) and all(torch.equal(found[name], after[name]) for name in after)
    assert (inside / "config.json").read_bytes() == (tmp_path / "out/config.json").read_bytes()


def test_the_plan_counts_the_biases_that_are_new(tmp_path):
    handle = handle_of(tiny_llama(tied=False))
    folder = saved(tmp_path, handle.model)
    recipe = recipe_for(Edit.shifting(2, torch.randn(32), 3.0), handle)
    planned = apply_to(recipe, folder, tmp_path / "out", plan=True)
    summary = apply_to(recipe, folder, tmp_path / "out")
    assert summary["bytes"] == planned["bytes_written"] == sum(f.stat().st_size for f in (tmp_path / "out").iterdir())


# --- merged, renamed and community models ---


def community(tmp_path):
    """A merged Llama as people upload it: odd config, extra tensors, no generation config, other formats beside."""
    handle = handle_of(tiny_llama(tied=False, dtype=torch.bfloat16))
    folder = saved(tmp_path, handle.model)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(4):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.rand(4)
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    shards = {f"merged-{n}.safetensors": {k: tensors[k] for k in names[n::2]} for n in range(2)}
    for file, held in shards.items():
        save_file(held, folder / file)  # no metadata at all
    weight_map = {name: file for file, held in shards.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"mergekit_version": "0.0.4"}, "weight_map": weight_map})
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"_name_or_path": "./merges/my-model-v2-final", "pretraining_tp": 1, "made_by": "a tool nobody knows"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    (folder / "pytorch_model-00001-of-00001.bin").write_text("pickle")
    (folder / "mergekit_config.yml").write_text("slices: []")
    (folder / "consolidated.safetensors").write_bytes(b"not even whole")
    (folder / "README.md").write_text("---\nlicense: llama3\ntags: [merge]\n---\n# My merge\n\nIt is nice.\n")
    return handle, folder


def test_a_merged_model_with_odds_and_ends(tmp_path):
    handle, folder = community(tmp_path)
    edit = Edit.uniform(find_writers(handle), torch.randn(32))
    recipe = recipe_for(edit, folder)
    summary = apply_to(recipe, folder, tmp_path / "out")
    assert summary["left_out"] == [
        "consolidated.safetensors", "pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json",
    ]  # fmt: skip
    out = tmp_path / "out"
    assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert (out / "model.safetensors.index.json").read_bytes() == (folder / "model.safetensors.index.json").read_bytes()
    assert (out / "mergekit_config.yml").read_text() == "slices: []"
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    assert torch.equal(tensors_of(out)[name], load_file(folder / "merged-0.safetensors" if name in load_file(
        folder / "merged-0.safetensors") else folder / "merged-1.safetensors")[name])  # fmt: skip
    edit.bake(handle)
    again = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(again(IDS).logits, handle.model(IDS).logits)


def test_the_card_says_what_was_done_and_keeps_the_models_own(tmp_path):
    import yaml

    handle, folder = community(tmp_path)
    recipe = recipe_for(Edit.uniform(find_writers(handle), torch.randn(32)), folder)
    apply_to(recipe, folder, tmp_path / "out", strength=0.5)
    card = (tmp_path / "out" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "llama3"
    assert head["tags"] == ["merge", "abliterate", "abliterated"]
    assert "9 weights, 1 direction of width 32, strength 0.5" in card
    assert "guardrail" in card
    assert "pytorch_model-00001-of-00001.bin" in card
    assert card.rstrip().endswith("It is nice.")
    assert card.count("license") == 1
    assert str(tmp_path) not in card


def test_a_recipe_by_names_alone_finds_its_tensors(tmp_path):
    """Without a model when it was made: the folder's skeleton says what the writers are."""
    from abliterate.edit.recipe import Recipe

    handle = handle_of(FAMILIES["gpt2"]())
    folder = saved(tmp_path, handle.model)
    edit = Edit.uniform(find_writers(handle), torch.randn(32))
    apply_to(Recipe(edit), folder, tmp_path / "out")
    edit.bake(handle)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(again(IDS).logits, handle.model(IDS).logits, atol=1e-5, rtol=1e-5)


def test_a_hub_snapshots_links_are_followed(tmp_path):
    folder = write_checkpoint(tmp_path / "blobs", small_shards())
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(file)
    apply_to(small_recipe(), snapshot, tmp_path / "out")
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())
    apply_to(small_recipe(), folder, tmp_path / "direct")
    ours, theirs = listing(tmp_path / "out"), listing(tmp_path / "direct")
    assert {n: b for n, b in ours.items() if n != "README.md"} == {n: b for n, b in theirs.items() if n != "README.md"}


def test_a_hub_id_is_downloaded(tmp_path, monkeypatch):
    import huggingface_hub

    folder = write_checkpoint(tmp_path / "cache", small_shards())
    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **kw: asked.update(name=name, **kw) or folder
    )
    assert local_folder("me/model", "v2") == folder
    assert (asked["name"], asked["revision"]) == ("me/model", "v2")
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])
    local_folder("me/model", weights=False)
    assert "*.safetensors" not in asked["allow_patterns"]


def test_a_hub_that_does_not_answer(tmp_path):
    with pytest.raises(ModelError, match=r"me/model not found: no such folder here, and the Hub"):
        local_folder("me/model")


def test_the_config_file_that_the_recipe_was_made_for_needs_no_transformers(tmp_path, monkeypatch):
    import transformers

    handle = handle_of(tiny_llama())
    folder = saved(tmp_path, handle.model)
    recipe = recipe_for(Edit.uniform(find_writers(handle), torch.randn(32)), folder)

    def asked(*_arguments, **_options):
        raise AssertionError("transformers was asked for the config")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", asked)
    apply_to(recipe, folder, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "use_cache": False}))  # no field of its shape
    apply_to(recipe, folder, tmp_path / "out", overwrite=True)
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    with pytest.raises(ModelError, match="was asked"):
        apply_to(recipe, folder, tmp_path / "out", overwrite=True)


# --- what can't be done ---


def test_a_recipe_for_another_config_needs_force(tmp_path):
    handle = handle_of(tiny_llama())
    folder = saved(tmp_path, handle.model)
    recipe = recipe_for(Edit.uniform(find_writers(handle), torch.randn(32)), handle)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    before = listing(tmp_path)
    with pytest.raises(RecipeError, match=r"--force"):
        apply_to(recipe, folder, tmp_path / "out")
    assert listing(tmp_path) == before
    apply_to(recipe, folder, tmp_path / "out", force=True)


def test_a_config_that_transformers_does_not_know_needs_force(tmp_path):
    folder = write_checkpoint(tmp_path / "model", small_shards())
    with pytest.raises(ModelError, match=r"config.json can't be used.*--force"):
        apply_to(small_recipe(config_hash="0" * 64), folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_float8_is_refused_or_left_out(tmp_path):
    shards = small_shards()
    first = shards["model-00001-of-00002.safetensors"]
    first["a.weight"] = first["a.weight"].to(torch.float8_e4m3fn)
    folder = write_checkpoint(tmp_path / "model", shards)
    with pytest.raises(ModelError, match=r"a\.weight.*F8_E4M3.*--skip-unsupported"):
        apply_to(small_recipe(), folder, tmp_path / "out")
    summary = apply_to(small_recipe(), folder, tmp_path / "out", skip_unsupported=True)
    assert summary["writers"] == 4
    assert any("left unedited, because of their dtype: a" in note for note in summary["notes"])
    new = tensors_of(tmp_path / "out")
    assert torch.equal(new["a.weight"].float(), first["a.weight"].float())
    assert torch.equal(new["a.bias"], first["a.bias"])


def test_packed_weights_are_named_as_such(tmp_path):
    handle = handle_of(tiny_llama(tied=False))
    folder = saved(tmp_path, handle.model)
    recipe = recipe_for(Edit.uniform(find_writers(handle), torch.randn(32)), handle)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name].flatten()[::2].to(torch.uint8)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"quantised \(bitsandbytes\).*original.*--as adapter"):
        apply_to(recipe, folder, tmp_path / "out", force=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, value):
    shards = small_shards()
    shards["model-00001-of-00002.safetensors"]["experts"][1, 2, 3] = value
    folder = write_checkpoint(tmp_path / "model", shards)
    with pytest.raises(NonFiniteError, match="experts"):
        apply_to(small_recipe(), folder, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_float16_that_overflows_is_named(tmp_path):
    shards = small_shards(torch.float16)
    recipe = small_recipe(-1.0)
    shards["model-00001-of-00002.safetensors"]["a.weight"] = (
        60000 * torch.from_numpy(recipe.edit.directions[0]).sign()[:, None].repeat(1, 24)
    ).half()
    folder = write_checkpoint(tmp_path / "model", shards)
    with pytest.raises(NonFiniteError, match=r"a\.weight"):
        apply_to(recipe, folder, tmp_path / "out")


def test_places_that_will_not_do(tmp_path):
    folder = write_checkpoint(tmp_path / "a" / "model", small_shards())
    before = listing(tmp_path)
    for out, match in (
        (folder, "is the model itself.*--in-place"), (folder / "out", "one in the other"),
        (tmp_path, "one in the other"),
    ):  # fmt: skip
        with pytest.raises(OutputError, match=match):
            apply_to(small_recipe(), folder, out, overwrite=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(OutputError, match="--overwrite"):
        apply_to(small_recipe(), folder, tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json is damaged"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "PEFT adapter; merge it"),
    ],
)
def test_folders_that_are_no_model(tmp_path, damage, match):
    folder = write_checkpoint(tmp_path / "model", small_shards())
    damage(folder)
    with pytest.raises(ModelError, match=match):
        apply_to(small_recipe(), folder, tmp_path / "out")


def test_models_that_are_not_safetensors_folders(tmp_path):
    (tmp_path / "m.gguf").touch()
    for model, match in ((tmp_path / "m.gguf", "--as gguf"), (tmp_path / "no", "not found"), ("", "name is empty")):
        with pytest.raises(ModelError, match=match):
            local_folder(str(model))
    pickles = write_checkpoint(tmp_path / "p", {"x.safetensors": {"a": torch.zeros(1)}})
    (pickles / "x.safetensors").rename(pickles / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickles"):
        apply_to(small_recipe(), pickles, tmp_path / "out")


def test_dtype_is_not_for_this_form(tmp_path):
    folder = write_checkpoint(tmp_path / "model", small_shards())
    with pytest.raises(AbliterateError, match="--dtype"):
        apply_to(small_recipe(), folder, tmp_path / "out", dtype="float16")


def test_a_cast_llama_in_bfloat16_is_within_one_rounding_of_baking(tmp_path):
    handle = handle_of(cast(tiny_llama(tied=False), torch.bfloat16))
    folder = saved(tmp_path, handle.model)
    edit = Edit.uniform(find_writers(handle), torch.randn(32))
    apply_to(recipe_for(edit, handle), folder, tmp_path / "out")
    edit.bake(handle)
    new = tensors_of(tmp_path / "out")
    for name, parameter in handle.model.named_parameters():
        torch.testing.assert_close(new[name].float(), parameter.float(), rtol=2**-7, atol=1e-6)
        assert (new[name] != parameter).float().mean() < 0.02  # at a tie float32 may round either way
    assert D_MODEL != 32  # this is the real model, not the hand-made one
