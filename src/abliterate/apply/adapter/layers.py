"""PEFT's layers, put into the model by PEFT itself: what their tensors are called and which way they lie."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from abliterate.common.errors import WriterError, shorten

if TYPE_CHECKING:
    from abliterate.models.handle import Handle
from abliterate.apply.adapter.low_rank import LowRank
from abliterate.apply.adapter.plan import Plan, is_conv1d


def installed(handle: Handle, plan: Plan, base: str) -> tuple[Any, dict[str, tuple[str, Any]], set[str]]:
    """Let PEFT put its layers into the model: they say what their tensors are called and which way they lie.

    PEFT takes some modules of mixtures for experts by the ends of their names (`down_proj` of a dense block beside
    them); such ones are then named by their weight, which it leaves as it is.

    Returns:
        The config, module or parameter name -> (place, PEFT's layer), and the names of all tensors it will look for.
    """
    from peft import get_peft_model, get_peft_model_state_dict

    modules = dict(handle.model.named_modules())
    by_weight: set[str] = set()
    for _ in range(2):
        config = _config(plan, modules, base, by_weight)
        try:
            with _quiet():
                adapted = get_peft_model(handle.model, config, low_cpu_mem_usage=True)
                expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        except ValueError as error:
            raise WriterError(f"{handle.source}: PEFT can't hold this edit: {shorten(str(error), 200)}") from error
        layers = _layers(adapted)
        wanted = set(plan.ranks) - by_weight | {f"{name}.weight" for name in by_weight}
        if set(layers) == wanted:
            # as asked for: what PEFT made of it here, it makes of it again when it is loaded
            return _config(plan, modules, base, by_weight), layers, expected
        by_weight |= {name for name in plan.modules if name not in layers}
        adapted.unload()
    odd = sorted(set(layers) ^ wanted)
    raise WriterError(f"{handle.source}: PEFT can't be told to hold {odd[0]} and the others of this edit alone")


def _config(plan: Plan, modules: Mapping[str, nn.Module], base: str, by_weight: Set[str]) -> Any:
    """PEFT's config; the modules in `by_weight` are named by their weight, a parameter."""
    from peft import LoraConfig, TaskType

    ranks = {f"{name}.weight" if name in by_weight else name: rank for name, rank in plan.ranks.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    unusual = {re.escape(name): rank for name, rank in ranks.items() if rank != usual}
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        inference_mode=True,
        r=usual,
        lora_alpha=usual,  # alpha / r is what a LoRA layer multiplies by
        rank_pattern=unusual,
        alpha_pattern=dict(unusual),
        target_modules=_targets(sorted(set(plan.modules) - by_weight), modules),
        target_parameters=sorted({*plan.parameters, *(f"{name}.weight" for name in by_weight)}) or None,
        modules_to_save=sorted(plan.copies) or None,
        lora_bias=bool(plan.biases),
        fan_in_fan_out=any(is_conv1d(modules[name]) for name in plan.modules),
        init_lora_weights=False,
        base_model_name_or_path=base,
    )


def _targets(names: list[str], modules: Mapping[str, nn.Module]) -> list[str] | str:
    """The LoRA layers' full names: PEFT takes a name in a list for the end of one as well, so where the model has
    another that ends so, they go as a pattern."""
    ends = tuple(f".{name}" for name in names)
    if any(name.endswith(ends) for name in modules):
        return "|".join(re.escape(name) for name in names)
    return names


def _layers(adapted: Any) -> dict[str, tuple[str, Any]]:
    """Module or parameter name -> the name and the layer that PEFT put there."""
    from peft.tuners.lora import LoraLayer

    found = {}
    for place, layer in adapted.named_modules():
        if isinstance(layer, LoraLayer):
            name = place.removeprefix("base_model.model.")
            parameter = getattr(layer, "parameter_name", None)
            name = name.replace(".base_layer", "")  # several parameters of one module are wrapped one in the other
            found[f"{name}.{parameter}" if parameter else name] = (place, layer)
    return found


def as_lora(place: str, layer: Any, low: LowRank, bias: Tensor | None, biased: bool) -> dict[str, Tensor]:
    """A change as the tensors of a PEFT layer: its B and A, whichever way its weight lies."""
    left, right = low
    if hasattr(layer, "parameter_name") and left.ndim == 3:
        experts, _, rank = left.shape
        turned = not layer._did_swap_in_out_features  # PEFT then reads [experts, in, out]
        b, a = (right.transpose(1, 2), left.transpose(1, 2)) if turned else (left, right)
        return {
            f"{place}.lora_A.weight": a.reshape(experts * rank, -1),
            f"{place}.lora_B.weight": b.permute(1, 2, 0).reshape(-1, rank * experts),
        }
    if isinstance(layer.get_base_layer(), nn.Embedding):
        return {f"{place}.lora_embedding_A": left.T, f"{place}.lora_embedding_B": right.T}
    if is_conv1d(layer.get_base_layer()):
        left, right = right.T, left.T
    tensors = {f"{place}.lora_A.weight": right, f"{place}.lora_B.weight": left}
    if biased:
        tensors[f"{place}.lora_B.bias"] = torch.zeros(len(left)) if bias is None else bias
    return tensors


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without PEFT's warnings about tied weights and biases, which the card answers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
