"""Damaged GGUF files: refused in one line, before anything is written, and before memory is taken."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from abliterate.apply.gguf.form import apply_gguf
from abliterate.common.errors import AbliterateError, ModelError
from abliterate.models.gguf.file import open_gguf
from gguf_files import OVERWRITE, SILENT, names, recipe_of, write_model

STRING, ARRAY, UINT32, F32 = 8, 9, 4, 0


def text(value: bytes, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if size is None else size) + value


def pair(kind: int, value: bytes, key: bytes = b"some.key") -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(*shape: int, name: bytes = b"a", kind: int = F32, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def header(*parts: bytes, tensors: int = 0, pairs: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + b"".join(parts) + bytes(4096)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"PK" + bytes(100), "doesn't begin as a GGUF does"),
        (header(version=9), "version 9"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(100), "big-endian"),
        (header(tensors=2**60), "a tensor's name has 0 bytes|ends in the middle"),
        (header(pairs=2**60), "ends in the middle|already in list"),
        (header(text(b"key", 2**63), pairs=1), "ends in the middle"),
        (header(pair(STRING, text(b"", 2**64 - 1)), pairs=1), "ends in the middle"),
        (header(pair(ARRAY, struct.pack("<IQ", UINT32, 2**62)), pairs=1), "ends in the middle"),
        (header(pair(ARRAY, struct.pack("<IQ", STRING, 2**23)), pairs=1), "ends in the middle"),
        (header(pair(ARRAY, struct.pack("<IQ", STRING, 2**60)), pairs=1), "array of 1,152,921,504,606,846,976 strings"),
        (header(pair(ARRAY, struct.pack("<IQ", ARRAY, 1)), pairs=1), "array of the unknown type 9"),
        (header(pair(99, b""), pairs=1), "99"),
        (header(pair(UINT32, bytes(4)), pair(UINT32, bytes(4)), pairs=2), "some.key"),
        (header(pair(UINT32, struct.pack("<I", 48), b"general.alignment"), pairs=1), "power of two"),
        (header(pair(UINT32, struct.pack("<I", 2**30), b"general.alignment"), pairs=1), "alignment is 1073741824"),
        (header(pair(STRING, text(b"\xff\xfe")), pairs=1), "utf-8"),
        (header(info(4, name=b"\xff"), tensors=1), "utf-8"),
        (header(info(4, name=b"n" * 64), tensors=1), "name has 64 bytes"),
        (header(info(1, 1, 1, 1, 1), tensors=1), "5 dimensions"),
        (header(info(), tensors=1), "0 dimensions"),
        (header(info(4, 0), tensors=1), r"shape \[0, 4\]"),
        (header(info(2**32, 2**32), tensors=1), "cut short"),
        (header(info(2**62, 2**62), tensors=1), "cut short"),
        (header(info(4, offset=2**64 - 32), tensors=1), "cut short"),
        (header(info(4, offset=7), tensors=1), "not aligned"),
        (header(info(4, kind=4000), tensors=1), "unknown type 4000"),
        (header(info(31, kind=2), tensors=1), r"type Q4_0 has shape \[31\]"),
        (header(info(4), info(4, offset=32), tensors=2), "twice"),
        (header(info(64), info(4, name=b"b", offset=32), tensors=2), "tensor b overlaps another"),
    ],
)
def test_a_lie_is_refused_in_one_line(tmp_path: Path, data: bytes, says: str) -> None:
    (tmp_path / "liar.gguf").write_bytes(data)
    with pytest.raises(ModelError, match=rf"liar\.gguf can't be read: .*({says})") as refused:
        open_gguf(tmp_path / "liar.gguf")
    assert len(str(refused.value).splitlines()) == 1


def test_texts_and_numbers_are_read_and_arrays_left_out(tmp_path: Path) -> None:
    file = open_gguf(write_model(tmp_path / "model.gguf", "Q8_0"))
    assert (file.architecture, file.number("block_count")) == ("llama", 2)
    assert file.metadata["tokenizer.ggml.tokens"] is None
    place = file.places["llama.embedding_length"]
    assert (tmp_path / "model.gguf").read_bytes()[place : place + 4] == struct.pack("<I", 32)
    tensor = file.tensors["blk.0.ffn_down.weight"]
    assert (tensor.shape, tensor.kind, tensor.start % file.alignment) == ((32, 64), "Q8_0", 0)
    assert file.raw(tensor).shape == (32, 68)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_model(tmp_path_factory.mktemp("whole") / "model.gguf", "Q4_0").read_bytes()


@pytest.mark.parametrize("part", [0, 3, 20, 0.02, 0.2, 0.5, 0.999])
def test_a_file_cut_short_stops_before_anything_is_written(tmp_path: Path, whole: bytes, part: float) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(whole[: part if isinstance(part, int) else int(part * len(whole))])
    with pytest.raises(ModelError, match=r"model\.gguf"):
        apply_gguf(recipe_of(names()), str(model), tmp_path / "out.gguf", OVERWRITE, SILENT)
    assert os.listdir(tmp_path) == ["model.gguf"]


def test_a_part_of_a_split_file_is_named(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "m-00001-of-00003.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.add_tensor("a", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"one of 3 parts; .*--merge"):
        open_gguf(tmp_path / "m-00001-of-00003.gguf")


def test_a_lying_number_of_blocks_is_no_reason_to_fill_the_memory(tmp_path: Path, whole: bytes) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(whole)
    place = open_gguf(model).places["llama.block_count"]
    model.write_bytes(whole[:place] + (2**32 - 1).to_bytes(4, "little") + whole[place + 4 :])
    with pytest.raises(ModelError, match=r"says it has 4,294,967,295 blocks .*and holds 2; get the file again"):
        apply_gguf(recipe_of(names()), str(model), tmp_path / "out.gguf", OVERWRITE, SILENT)


@pytest.mark.parametrize(("says", "words"), [(1, "says it has 1 blocks .* holds 2;"), (3, "says it has 3 .* holds 2;")])
def test_more_or_fewer_blocks_than_it_says(tmp_path: Path, whole: bytes, says: int, words: str) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(whole)
    place = open_gguf(model).places["llama.block_count"]
    model.write_bytes(whole[:place] + says.to_bytes(4, "little") + whole[place + 4 :])
    with pytest.raises(ModelError, match=words):
        open_gguf(model)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.integers(0, 2600), st.binary(min_size=1, max_size=9)), max_size=4),
    length=st.one_of(st.none(), st.integers(0, 8000)),
)
def test_a_mutated_file_gives_a_whole_output_or_our_own_error(
    tmp_path: Path, whole: bytes, changes: list[tuple[int, bytes]], length: int | None
) -> None:
    data = bytearray(whole[:length])
    for place, new in changes:
        if data:
            at = place % len(data)
            data[at : at + len(new)] = new[: len(data) - at]
    model, out = tmp_path / "model.gguf", tmp_path / "out.gguf"
    model.write_bytes(data)
    out.unlink(missing_ok=True)
    try:
        apply_gguf(recipe_of(names()), str(model), out, OVERWRITE, SILENT)
    except AbliterateError:
        assert not out.exists()
    else:
        open_gguf(out)
    assert {p.name for p in tmp_path.iterdir()} <= {"model.gguf", "out.gguf"}
