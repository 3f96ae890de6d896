"""An edit as a PEFT LoRA: how it is held, its factors, PEFT's layers, and the folder."""

from abliterate.apply.adapter.form import apply_adapter as apply_adapter
from abliterate.apply.adapter.form import merged as merged
