"""The Axolotl configuration: keys from its schema, the article's values, and the same pairs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from abliterate.common.errors import AbliterateError, OutputError
from abliterate.heal.axolotl import axolotl_configuration, write_axolotl
from abliterate.heal.preferences import load_preferences, read_pairs
from abliterate.heal.training import Job
from abliterate.settings.heal import HealRunSettings, HealSettings
from preference_pairs import colours, write_pairs

# Names of the fields of AxolotlInputConfig, DPODataset and FSDPConfig in the axolotl package on PyPI
KEYS = json.loads((Path(__file__).parents[1] / "data" / "axolotl_keys.json").read_text())
EVERY_OPTION = {
    "plain": {},
    "lora": {"quantise": "none", "target_modules": "q_proj, v_proj", "optimizer": "adamw_torch", "bf16": "no"},
    "fsdp": {"launch": "fsdp", "report_to": "wandb", "max_steps": 5, "warmup": 10},
    "zero2": {"launch": "zero2", "report_to": "trackio", "gradient_checkpointing": False},
    "zero3": {"launch": "zero3", "held_out": 0.0, "save_steps": 0},
}


def a_job(folder, load=None, **heal):
    settings = HealRunSettings.model_validate({"heal": heal, "load": load or {}})
    return Job(model="mlabonne/Daredevil-8B-abliterated", folder=folder / "out", settings=settings)


@pytest.mark.parametrize("options", EVERY_OPTION)
def test_every_key_is_in_axolotls_schema(options, tmp_path, pairs_file):
    load = {"revision": "main", "trust_remote_code": True, "chat_template": "template.jinja"}
    job = a_job(tmp_path, load, data=str(pairs_file), **EVERY_OPTION[options])
    write_axolotl(job, tmp_path / "a.yaml")
    found = yaml.safe_load((tmp_path / "a.yaml").read_text())
    assert set(found) <= set(KEYS["config"])
    assert set(found.get("fsdp_config", {})) <= set(KEYS["fsdp_config"])
    for dataset in (*found["datasets"], *found.get("test_datasets", [])):
        assert set(dataset) <= set(KEYS["dataset"])


def test_the_articles_values(tmp_path):
    """As in its configuration, under today's names."""
    found = axolotl_configuration(a_job(tmp_path), tmp_path / "p.jsonl", None)
    article = {
        "base_model": "mlabonne/Daredevil-8B-abliterated", "load_in_4bit": True, "strict": False, "rl": "dpo",
        "val_set_size": 0.0, "adapter": "qlora", "sequence_len": 2048, "sample_packing": False,
        "pad_to_sequence_len": False, "lora_r": 64, "lora_alpha": 32, "lora_dropout": 0.05, "lora_target_linear": True,
        "gradient_accumulation_steps": 8, "micro_batch_size": 1, "num_epochs": 1, "optimizer": "paged_adamw_8bit",
        "lr_scheduler": "cosine", "learning_rate": 5e-6, "bf16": "auto", "gradient_checkpointing": True,
        "weight_decay": 0.0,
    }  # fmt: skip
    assert {name: found.get(name) for name in article} == article


def test_options_reach_it(tmp_path):
    every = a_job(
        tmp_path, {"chat_template": "chatml"}, rank=4, alpha=8, beta=0.3, max_steps=5, warmup=10, quantise="none",
        target_modules="q_proj, v_proj", launch="fsdp", report_to="wandb",
    )  # fmt: skip
    found = axolotl_configuration(every, tmp_path / "p.jsonl", None)
    expected = {
        "lora_r": 4, "lora_alpha": 8, "rl_beta": 0.3, "max_steps": 5, "warmup_steps": 10, "adapter": "lora",
        "load_in_4bit": False, "lora_target_modules": ["q_proj", "v_proj"], "fsdp_version": 2, "wandb_mode": "offline",
        "chat_template": "chatml",
    }  # fmt: skip
    assert {name: found.get(name) for name in expected} == expected
    assert "warmup_ratio" not in found and "lora_target_linear" not in found
    default = axolotl_configuration(a_job(tmp_path, launch="zero2"), tmp_path / "p.jsonl", None)
    assert default["chat_template"] == "tokenizer_default_fallback_chatml"
    assert default["warmup_ratio"] == 0.02
    assert default["deepspeed"] == "deepspeed_configs/zero2.json"


def test_it_trains_on_the_same_pairs(tmp_path, heard):
    refusing = {"prompt": "a?", "chosen": "I'm sorry, but I can't help with that.", "rejected": "b"}
    source = write_pairs(tmp_path / "source.jsonl", [*colours(20), refusing])
    job = a_job(tmp_path, {"system_prompt": "Be kind."}, data=str(source), held_out=0.2)
    found = write_axolotl(job, tmp_path / "a.yaml", reporter=heard)
    assert any("1 whose chosen answer refuses" in line for line in heard.lines)
    assert found["datasets"][0]["path"] == str(tmp_path / "a.pairs.jsonl")
    expected = load_preferences(job.settings.heal)
    for key, pairs in (("datasets", expected.train), ("test_datasets", expected.held_out)):
        file = Path(found[key][0]["path"])
        for name in ("field_messages", "field_chosen", "field_rejected"):
            assert found[key][0][name] in json.loads(file.read_text().splitlines()[0])
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert [row["chosen"]["content"] for row in rows] == [pair.chosen for pair in pairs]
        assert [row["rejected"]["content"] for row in rows] == [pair.rejected for pair in pairs]
        assert all(row["messages"][0] == {"role": "system", "content": "Be kind."} for row in rows)
    # and this program can train on the file that was written for Axolotl
    rows = [json.loads(line) for line in (tmp_path / "a.pairs.jsonl").read_text().splitlines()]
    again = write_pairs(tmp_path / "again.jsonl", [{**r, **{k: [r[k]] for k in ("chosen", "rejected")}} for r in rows])
    assert len(read_pairs(HealSettings(data=str(again), prompt_column="messages"))) == len(expected.train)


def test_what_cannot_be_written(tmp_path, pairs_file):
    with pytest.raises(AbliterateError, match="nothing like self"):
        write_axolotl(a_job(tmp_path, preset="self"), tmp_path / "a.yaml")
    with pytest.raises(AbliterateError, match=r"--alpha 1\.5"):
        write_axolotl(a_job(tmp_path, data=str(pairs_file), alpha=1.5), tmp_path / "b.yaml")
    (tmp_path / "c.yaml").write_text("mine")
    with pytest.raises(OutputError, match=r"c\.yaml exists"):
        write_axolotl(a_job(tmp_path, data=str(pairs_file)), tmp_path / "c.yaml")
    assert (tmp_path / "c.yaml").read_text() == "mine"
    write_axolotl(a_job(tmp_path, data=str(pairs_file)), tmp_path / "c.yaml", overwrite=True)
    assert "rl: dpo" in (tmp_path / "c.yaml").read_text()
