"""A GGUF for Ollama and LM Studio: the Modelfile says what transformers does, a real server stops where it should."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any

import pytest
import requests
import torch

import abliterate as ab
from abliterate.apply.gguf.adapter import apply_gguf_adapter
from abliterate.edit.edit import Edit
from abliterate.prompts.chat import CHATML, format_conversation, render_conversation
from abliterate.publish.front_ends import modelfile, turns_of
from command import fails, succeeds
from gguf_files import OVERWRITE, SILENT, write_model
from long import LONG

USER = {"role": "user", "content": "Name a fruit."}
TALK = [
    {"role": "user", "content": "Name a fruit."},
    {"role": "assistant", "content": "The plum."},
    {"role": "user", "content": "Tell me a short story about a farmer who grows it."},
]
SYSTEM = {"role": "system", "content": "Be brief."}
SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are SmolLM<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + "
    "'<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n"
    "{{ (first if loop.first else '') + m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }}</s>{% endif %}"
    "{% endfor %}"
)
COUNTS = "{% for m in messages %}{{ loop.index }}. {{ m['content'] }}\n{% endfor %}"


@pytest.fixture
def tokenizer(tiny_folder: Path) -> Any:
    from abliterate.models.loading import load_tokenizer

    return load_tokenizer("tiny", tiny_folder, trust_remote_code=False)


@pytest.mark.parametrize("template", [CHATML, SMOLLM, LLAMA, GEMMA])
def test_what_ollama_writes_is_what_the_template_writes(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    turns = turns_of(tokenizer)
    assert turns is not None
    for talk in ([USER], TALK, [*TALK, *TALK[1:]], [SYSTEM, USER], [SYSTEM, *TALK]):
        assert turns.render(talk) == render_conversation(tokenizer, talk)
    go = turns.go()
    assert go.count("{{ .Content }}") == 2 and go.count("{{ .System }}") == 1
    assert go.endswith(turns.next) and go.count("{{ if") + go.count("{{ range") == go.count("{{ end }}")


def test_a_template_without_system_prompts(tokenizer: Any) -> None:
    tokenizer.chat_template = NO_SYSTEM
    turns = turns_of(tokenizer)
    assert turns is not None and turns.system is None and ".System" not in turns.go()
    assert turns.render(TALK) == render_conversation(tokenizer, TALK)


@pytest.mark.parametrize("template", [COUNTS, CHATML.replace("<|im_start|>", "{{ '{{' }}"), None])
def test_what_cant_be_said_is_left_out(tokenizer: Any, template: str | None) -> None:
    tokenizer.chat_template = template
    assert turns_of(tokenizer) is None


def test_the_modelfile(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = SMOLLM
    tokenizer.save_pretrained(tmp_path)
    sampling = {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1, "do_sample": True}
    (tmp_path / "generation_config.json").write_text(json.dumps({**sampling, "eos_token_id": [1, 2]}))
    text, notes = modelfile(tmp_path, "./m.gguf")
    stops = tokenizer.convert_ids_to_tokens([1, 2])
    assert text.startswith('FROM ./m.gguf\nTEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}{{ else }}')
    assert "PARAMETER temperature 0.6\nPARAMETER top_k 20\nPARAMETER repeat_penalty 1.1\n" in text
    assert text.endswith("".join(f"PARAMETER stop {json.dumps(stop)}\n" for stop in stops)) and not notes
    tokenizer.chat_template = COUNTS
    tokenizer.save_pretrained(tmp_path)
    text, notes = modelfile(tmp_path, "./m.gguf")
    assert "TEMPLATE" not in text and "chat template" in notes[0]


def test_the_command_hands_a_run_to_both(tiny_folder: Path, tmp_path: Path) -> None:
    run, studio = tmp_path / "fox-abliterated", tmp_path / "models"
    run.mkdir()
    (run / "model").symlink_to(tiny_folder)
    made = write_model(tmp_path / "made.gguf", "BF16")
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text(f"import shutil, sys; shutil.copy({str(made)!r}, sys.argv[3])")
    common = ("export", run, "--converter", script, "--gguf", "q8_0", "--ollama", "--lmstudio", studio)
    told = succeeds(*common, "--json").json
    file = Path(told["lmstudio"])
    assert file.relative_to(studio).parts == ("abliterate", run.resolve().name, file.name)
    assert Path(told["out"]).samefile(file) and Path(told["out"]).parent == run
    assert Path(told["modelfile"]).read_text().startswith(f"FROM ./{Path(told['out']).name}\n")
    assert "exists" in fails(tmp_path, *common)
    assert "ollama create" in succeeds(*common, "--overwrite").out


SERVER = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.use_jinja = sys.argv[1], 2048, 1, True
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
lora = xllamacpp.CommonAdapterLoraInfo()
lora.path, lora.scale = sys.argv[2], 0.0
params.lora_adapters = [lora]
server = xllamacpp.Server(params)
print("at", server.listening_address, flush=True)
sys.stdin.read()
"""


@contextmanager
def served(gguf: Path, lora: Path) -> Iterator[str]:
    command = [sys.executable, "-c", SERVER, str(gguf), str(lora)]
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, text=True) as server:
        assert server.stdout is not None
        try:
            yield next(line.split()[1] for line in server.stdout if line.startswith("at "))
        finally:
            server.kill()


@LONG
def test_a_real_server_answers_as_transformers(demo_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    """Template, end of the answer, and the LoRA at three scales, with and without the cache of prompts."""
    pytest.importorskip("xllamacpp")
    handle = ab.load(ab.demo_model(), dtype="float32")
    generator = torch.Generator().manual_seed(3)
    inside = [writer for writer in ab.find_writers(handle) if writer.side != "embedding"]
    edit = Edit.uniform(inside, torch.randn(handle.d_model, generator=generator), 2.0)
    recipe = ab.recipe_for(edit, handle)
    apply_gguf_adapter(recipe, str(demo_gguf("F32")), tmp_path / "lora.gguf", OVERWRITE, SILENT)
    ids = format_conversation(handle.tokenizer, TALK)
    wanted = {}
    for scale in (0.0, 0.5, 1.0):
        with (scale * edit).attached(handle), torch.inference_mode():
            made = handle.model.generate(torch.tensor([ids]), max_new_tokens=48, do_sample=False)
        wanted[scale] = handle.tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)
    assert len(set(wanted.values())) == 3
    with served(demo_gguf("F32"), tmp_path / "lora.gguf") as url:
        rendered = requests.post(f"{url}/apply-template", json={"messages": TALK}, timeout=60).json()["prompt"]
        assert rendered == render_conversation(handle.tokenizer, TALK)
        for cached in (False, True):
            for scale, text in wanted.items():
                asked = {"messages": TALK, "temperature": 0, "max_tokens": 48, "cache_prompt": cached}
                asked["lora"] = [{"id": 0, "scale": scale}]
                (choice,) = requests.post(f"{url}/v1/chat/completions", json=asked, timeout=300).json()["choices"]
                assert choice["message"]["content"].strip() == text.strip(), (cached, scale)
        short = {"messages": [{"role": "user", "content": "Say hello."}], "temperature": 0, "max_tokens": 200}
        (choice,) = requests.post(f"{url}/v1/chat/completions", json=short, timeout=300).json()["choices"]
        assert choice["finish_reason"] == "stop" and "<|" not in choice["message"]["content"]
