"""A GGUF made into a safetensors folder is what transformers makes of it in memory."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from gguf.gguf_reader import GGUFReader
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from abliterate.common.errors import ModelError
from abliterate.common.reporting import Silent
from abliterate.edit.edit import Edit
from abliterate.models.demo import plain_source
from abliterate.models.folders import _weights_in
from abliterate.models.gguf import convert
from abliterate.models.gguf.convert import converted
from abliterate.models.gguf.file import open_gguf
from abliterate.models.loading import load
from abliterate.models.shards import read_shard
from abliterate.models.writers import find_writers
from abliterate.publish.gguf import find_converter
from abliterate.run.facts import recipe_of
from abliterate.run.saving import save_edited
from gguf_files import write_model
from long import LONG
from models import FAMILIES, _sizes, save_tiny, tiny, tiny_llama
from peaks import peak_of


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ABLITERATE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


MODELS = ["llama", "mistral", "qwen2", "gemma3_text", "starcoder2", "qwen3_moe"]


@pytest.fixture(scope="module")
def there_and_back(tmp_path_factory):
    """Tiny models, and what llama.cpp's converter makes of each: name -> (folder, file)."""
    folder = tmp_path_factory.mktemp("gguf")
    # transformers reads no width of the experts from a GGUF, and takes Qwen3's 768
    built = FAMILIES | {
        "qwen3_moe": partial(tiny, "qwen3_moe", **_sizes(tied=False), num_experts=4, num_experts_per_tok=2)
    }
    pairs = {name: (save_tiny(folder / name, built[name]()), folder / f"{name}.gguf") for name in MODELS}
    arguments = [str(path) for pair in pairs.values() for path in pair]
    script = Path(__file__).parents[2] / "convert_tiny.py"
    done = subprocess.run(
        [sys.executable, str(script), str(find_converter()), *arguments], capture_output=True, text=True
    )
    assert not done.stdout, done.stdout + done.stderr
    return pairs


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpps_converter_and_this_one_are_inverse(there_and_back, own_cache, tmp_path, name):
    folder, file = there_and_back[name]
    handle = load(file, dtype="float32")
    assert handle.folder.parent == own_cache and (handle.source, handle.source_dtype) == (str(file), torch.float32)
    wanted, found = (load_file(place / "model.safetensors") for place in (folder, handle.folder))
    assert wanted.keys() == found.keys()
    for tensor, values in wanted.items():
        torch.testing.assert_close(found[tensor], values, atol=1e-6, rtol=0, msg=tensor)  # Gemma's norms: + 1 - 1
    made = handle.folder.stat().st_mtime_ns
    assert converted(file, "float32") == handle.folder and handle.folder.stat().st_mtime_ns == made
    edit = Edit.uniform(find_writers(handle), torch.randn(handle.d_model), 0.5)
    save_edited(handle, recipe_of(handle, edit), tmp_path / "out", "card", Silent())
    again, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), torch.tensor([[5, 17, 300, 42, 7, 99]])
    with edit.attached(handle):
        torch.testing.assert_close(again(ids).logits, handle.model(ids).logits, atol=2e-5, rtol=1e-5)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (handle.folder / name).read_bytes()


def with_a_block_ahead(file: Path, out: Path) -> int:
    """A copy of a GGUF with one more block, for multi-token prediction; returns how many it had."""
    reader = GGUFReader(file)
    writer = GGUFWriter(out, "llama")
    blocks = int(reader.fields["llama.block_count"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            value = field.contents() + (key == "llama.block_count") if key == "llama.block_count" else field.contents()
            writer.add_key_value(key, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
    writer.add_uint32("llama.nextn_predict_layers", 1)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    for name in ("ffn_down.weight", "nextn.eh_proj.weight"):
        writer.add_tensor(f"blk.{blocks}.{name}", reader.tensors[-1].data.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return blocks


@pytest.mark.slow
def test_blocks_that_predict_further_tokens_are_left_out(there_and_back, tmp_path):
    folder, file = there_and_back["llama"]
    blocks = with_a_block_ahead(file, tmp_path / "mtp.gguf")
    handle = load(tmp_path / "mtp.gguf", dtype="float32")
    assert handle.layers == blocks
    ids = torch.tensor([[5, 17, 300, 42]])
    torch.testing.assert_close(handle.model(ids).logits, load(folder, dtype="float32").model(ids).logits)


def test_a_projector_beside_a_gguf_is_set_aside(tmp_path):
    (tmp_path / "m").mkdir()
    path = write_model(tmp_path / "m/x.gguf")
    (tmp_path / "m/mmproj-x-f16.gguf").write_bytes(b"GGUF")
    assert _weights_in(tmp_path / "m", "m") == path


@LONG
def test_weights_tokenizer_and_template_are_those_of_transformers():
    """Of a packed file; transformers alone takes a minute for it."""
    source = Path(plain_source())
    handle = load(source, dtype="bfloat16")
    theirs = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16)
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter, handle.model.get_parameter(name)), name
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    text = "Grüße ☃, 12345 apples\n\n<|im_start|>user"
    assert tokenizer(text)["input_ids"] == handle.tokenizer(text)["input_ids"]
    assert tokenizer.chat_template == handle.tokenizer.chat_template
    assert handle.config_hash == load(handle.folder, dtype="bfloat16").config_hash


def test_the_metadata_is_read_as_the_package_reads_it(tmp_path):
    path = write_model(tmp_path / "x.gguf")
    ours, theirs = convert._Quick(path), GGUFReader(path)
    assert ours.fields.keys() == theirs.fields.keys()
    for key, field in theirs.fields.items():
        assert ours.fields[key].contents() == field.contents(), key
        assert ours.fields[key].types == field.types
    assert [t.name for t in ours.tensors] == [t.name for t in theirs.tensors]


def test_a_streamed_file_is_a_safetensors_file(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.randn(2, 2, 2).half()}
    with convert.Stream(tmp_path / "x.safetensors", 1000) as stream:
        for name, tensor in tensors.items():
            stream.add(name, tensor)
    assert stream.main_dtype == torch.float32
    read_shard(tmp_path / "x.safetensors")
    for name, tensor in load_file(tmp_path / "x.safetensors").items():
        assert torch.equal(tensor, tensors[name])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q8_0", "F32"])
def test_memory_is_some_tensors_whatever_the_file_has(tmp_path, monkeypatch, kind):
    side, wanted = 512, torch.float32 if kind == "F32" else torch.bfloat16
    file = open_gguf(write_model(tmp_path / "x.gguf", kind, width=side, inner=side, blocks=6))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_llama(layers=6).config)
    model.config.hidden_size = side
    monkeypatch.setattr(convert, "CHUNK", side * side // 8)

    def write():
        assert convert._write(file, model, tmp_path / "x.safetensors", wanted) == wanted

    def traced():
        tracemalloc.start()  # numpy's, where torch's profiler sees torch's
        try:
            write()
            held.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()

    held = []
    write()  # what is imported on the way doesn't count
    held.append(peak_of(traced))
    one = side * side * wanted.itemsize
    assert (tmp_path / "x.safetensors").stat().st_size > 18 * one
    assert 0.9 * one < sum(held) < 4 * one


def test_a_file_that_transformers_has_no_model_for_leaves_nothing(tmp_path, own_cache):
    path = write_model(tmp_path / "x.gguf", architecture="rwkv6")
    with pytest.raises(ModelError, match=r"x\.gguf can't be loaded: .*rwkv6"):
        load(path)
    assert not list(own_cache.glob("*")) and not list(own_cache.glob(".*"))
