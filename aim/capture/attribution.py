"""From the parameters of a running model to the tensors that its checkpoint stores, and why some are not measured."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from torch import Tensor, nn

from aim.capture.hooks import output_head
from aim.capture.parameter_map import Binding, bindings, parts
from aim.capture.statistics import Activations
from aim.importance import Importance
from common.versions import MERGING, versions
from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.tensor_names import PARTS
from merging.plan.tied_weights import main_of

UNREACHED = "no calibration token reached it"
NOT_TEXT = {
    "vision_tower": "text does not reach the vision tower",
    "audio_tower": "text does not reach the audio tower",
    "multi_modal_projector": "text does not pass the projector",
}


def by_stored_tensor(activations: Activations, model: nn.Module, base: Checkpoint) -> Importance:
    """Return statistics of a model's parameters as those of the tensors that the checkpoint stores."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    stored = {name: info.shape for name, info in base.tensors.items()}
    bound = bindings(model, stored)
    means: dict[str, Tensor] = {}
    axes: dict[str, int] = {}
    tokens: dict[str, Any] = {}
    stability: dict[str, Any] = {}
    unmeasured: dict[str, str] = {}
    for name, mean in activations.means.items():
        stacked = mean.dim() == 2
        binding = bound.get(name)
        if binding is None:  # a head that is not stored, since it is the embedding
            means[name], axes[name] = mean, activations.axes[name]
            tokens[name], stability[name] = activations.tokens[name], activations.stability[name]
            continue
        stored_parts = parts(binding, activations.axes[name], shapes[name], stacked, stored)
        for part in stored_parts:
            one = part.expert if stacked else None
            means[part.name] = mean if one is None else mean[one]
            axes[part.name] = part.axis
            tokens[part.name] = activations.tokens[name] if one is None else activations.tokens[name][one]
            whole = activations.stability[name]
            stability[part.name] = whole[one] if one is not None and isinstance(whole, list) else whole
        part_names = {part.name for part in stored_parts}
        unmeasured |= {key: "its input channels cannot be told" for key in binding.names if key not in part_names}
    for name, binding in bound.items():
        for key in binding.names:
            if name not in activations.means and _takes_input(name, model):
                unmeasured[key] = _unreached(key)
    table, head = main_of(base, "input"), _head_entry(model, means, bound)
    heads = {table: head} if base.ties_embeddings and table is not None and head is not None else {}
    return Importance(
        activations=means, axes=axes, unmeasured=unmeasured, calibration={}, base={}, tokens=tokens,
        stability=stability, heads=heads, versions=versions(MERGING),
    )  # fmt: skip


def _takes_input(name: str, model: nn.Module) -> bool:
    """Return whether a parameter is a matrix of products or a norm's weight; tables and biases take no input."""
    path, _, leaf_name = name.rpartition(".")
    module = model.get_submodule(path)
    parameter = module._parameters.get(leaf_name)
    if parameter is None or not parameter.is_floating_point() or isinstance(module, nn.Embedding):
        return False
    return parameter.dim() >= 2 or leaf_name == "weight"


def _head_entry(model: nn.Module, means: Container[str], bound: Mapping[str, Binding]) -> str | None:
    """The entry that holds what the output head gets."""
    head = output_head(model)
    path = next((path for path, module in model.named_modules() if module is head), None)
    if head is None or path is None:
        return None
    name = f"{path}.weight"
    stored = bound[name].names[0] if name in bound else name
    return stored if stored in means else None


def _unreached(name: str) -> str:
    """Return the reason, from its name, why no input of a weight was captured."""
    return next((reason for part, reason in NOT_TEXT.items() if PARTS[part].search(name)), UNREACHED)
