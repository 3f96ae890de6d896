"""The projector of a multimodal model: what writes the image tokens that its language model reads."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from abliterate.common.errors import WriterError, shorten
from abliterate.models.handle import Handle
from abliterate.models.trace import Call, linear_parameters, record

PATCHES = 4  # of a side, where the model takes images of any size


class _ImageFeatures(nn.Module):
    """The part of a model from pixels to image tokens, as one module: features [token, d_model]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **images: Any) -> Tensor:
        out = self.model.get_image_features(**images)  # type: ignore[operator]
        features = getattr(out, "pooler_output", out)
        if isinstance(features, tuple | list):
            features = torch.cat([f.reshape(-1, f.shape[-1]) for f in features])
        return features.reshape(-1, features.shape[-1])


def projector_parameters(handle: Handle) -> dict[nn.Module, dict[str, int]]:
    """The parameters that the image tokens are linear in, with their axis along d_model, by module.

    Noise goes through the vision tower; the parameters are found as `trace.linear_parameters` says.

    Returns:
        Nothing for a model without images.

    Raises:
        WriterError: when the vision part can't be run on noise, or no parameter explains the image tokens.
    """
    base = handle.model.base_model
    if not hasattr(base, "get_image_features") or not hasattr(handle.model.config, "vision_config"):
        return {}
    part, images = _ImageFeatures(base), _noise(handle)
    try:
        calls = record(part.modules(), lambda: part(**images), handle.d_model)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise WriterError(
            f"model {handle.source}: its vision part doesn't run on noise ({shorten(str(error), 120)}), so its "
            "projector can't be found; the language model can be edited without it"
        ) from error
    owners = {call.module for call in calls}
    whole = next(call for call in reversed(calls) if call.module is part)
    used = [name for name, _ in part.named_parameters() if part.get_submodule(name.rpartition(".")[0]) in owners]
    with torch.inference_mode():
        found = linear_parameters(Call(part, (), images, None, whole.output), handle.d_model, used)
    if not found:
        raise WriterError(f"model {handle.source}: can't tell what writes its image tokens")
    modules: dict[nn.Module, dict[str, int]] = {}
    for name, axis in found.items():
        path, _, last = name.rpartition(".")
        modules.setdefault(part.get_submodule(path), {})[last] = axis
    return modules


def _noise(handle: Handle) -> dict[str, Tensor]:
    """Inputs of `get_image_features` for one image of noise, made after its signature and the vision config."""
    vision = handle.model.config.vision_config
    takes = inspect.signature(handle.model.base_model.get_image_features).parameters
    generator = torch.Generator().manual_seed(0)
    channels = next((int(n) for f in ("num_channels", "in_channels", "in_chans") if (n := getattr(vision, f, 0))), 3)
    patch = int(getattr(vision, "patch_size", 14))
    merge = int(getattr(vision, "spatial_merge_size", getattr(handle.model.config, "spatial_merge_size", 1)))

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(handle.device, handle.dtype)

    if "image_grid_thw" in takes:  # patches in a row
        grid = torch.tensor([[1, PATCHES * merge, PATCHES * merge]], device=handle.device)
        size = channels * int(getattr(vision, "temporal_patch_size", 1)) * patch * patch
        return {"pixel_values": noise(int(grid.prod()), size), "image_grid_thw": grid}
    any_size = "image_sizes" in takes and takes["image_sizes"].default is inspect.Parameter.empty
    side = PATCHES * merge * patch if any_size else getattr(vision, "image_size", 224)
    high, wide = (side, side) if isinstance(side, int) else side
    images = {"pixel_values": noise(1, channels, high, wide)}
    if any_size:
        images["image_sizes"] = torch.tensor([[high, wide]], device=handle.device)
    return images
