"""The base as a model that runs: whole on a device, or a skeleton filled from the checkpoint part by part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from aim.capture.hooks import output_head
from aim.capture.parameter_map import Binding, bindings
from aim.capture.weight_prefetch import WeightPrefetch
from common.errors import CalibrationError
from common.quiet_transformers import quiet_transformers
from common.terminal_text import foreign
from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.storage import tensor_bytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Fill: TypeAlias = Callable[[Mapping[str, Tensor], Mapping[str, Binding], torch.device], None]
"""Function of stored tensors, bindings and a device that puts the tensors where they belong in a model."""
EAGER = "eager"
"""How experts are run: one product per expert, so that what each of them gets is seen."""


def config_of(base: Checkpoint) -> PretrainedConfig:
    """Return transformers' config of the base. Raises CalibrationError where transformers does not know it."""
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            config: PretrainedConfig = AutoConfig.from_pretrained(
                base.folder, trust_remote_code=False, local_files_only=True
            )
    except Exception as error:  # transformers raises whatever a broken config makes it stumble over
        if "trust_remote_code" in str(error):
            raise CalibrationError(
                f"{base.name} needs code of its own, which is never run; the importance of such a base cannot be "
                "measured."
            ) from error
        raise CalibrationError(
            f"transformers cannot read the config of {base.name} ({foreign(str(error), 200)})."
        ) from error
    for part in (config, getattr(config, "text_config", None)):
        if part is not None:
            part._experts_implementation = EAGER
    return config


def class_of(base: Checkpoint, config: PretrainedConfig) -> type[PreTrainedModel]:
    """Return the class that the base's config names, or transformers' causal language model for it.

    Raises CalibrationError where there is none.
    """
    import transformers

    for name in base.config.get("architectures") or []:
        if hasattr(transformers, name):
            named: type[PreTrainedModel] = getattr(transformers, name)
            return named
    try:
        mapping: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING  # its annotations say pairs of classes
        causal: type[PreTrainedModel] = mapping[type(config)]
        return causal
    except KeyError:
        raise CalibrationError(
            f"transformers {transformers.__version__} has no class for {base.name} "
            f"({', '.join(base.config.get('architectures') or ['config.json names none'])}); it cannot be run."
        ) from None


def weight_bytes(base: Checkpoint, dtype: str) -> int:
    """Return the size of all weights in a dtype."""
    return sum(tensor_bytes(info.shape, dtype) for info in base.tensors.values())


def load_whole(base: Checkpoint, dtype: str, device: torch.device, spread: bool = False) -> nn.Module:
    """Load the base onto a device, or spread over all GPUs by accelerate's device map. Raises CalibrationError."""
    config = config_of(base)
    cls = class_of(base, config)
    places: dict[str, Any] = {"device_map": "auto"} if spread else {}
    with quiet_transformers():
        try:
            model: nn.Module = cls.from_pretrained(
                base.folder, config=config, dtype=getattr(torch, dtype), trust_remote_code=False, local_files_only=True,
                **places,
            )  # fmt: skip
        except Exception as error:  # transformers raises whatever a broken checkpoint makes it stumble over
            text = foreign(str(error), 300)
            raise CalibrationError(f"{base.name} does not load in transformers ({text}).") from error
    outside = set(getattr(model, "hf_device_map", {}).values()) & {"cpu", "disk"}
    if spread and outside:
        raise CalibrationError(f"{base.name} does not fit on the GPUs; use --calibration_mode layerwise.")
    result: nn.Module = model.eval() if spread else model.to(device).eval()
    return result


class Skeleton:
    """A model on the meta device whose parameters are filled from the checkpoint, part by part.

    `bindings`: what is stored for each parameter; `fills` counts the times that something was filled.
    """

    def __init__(self, base: Checkpoint, dtype: str, device: torch.device) -> None:
        from accelerate import init_empty_weights

        self.base, self.dtype, self.device = base, getattr(torch, dtype), device
        config = config_of(base)
        cls = class_of(base, config)
        with quiet_transformers(), init_empty_weights(include_buffers=False):
            self.model: PreTrainedModel = cls._from_config(config, dtype=self.dtype)
        self.model.eval()
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device.type != "meta":
                    module._buffers[name] = buffer.to(device)
        self.bindings = bindings(self.model, base.tensors)
        self.fills = 0
        self._fill = _filler(self.model, self.dtype)
        self.ahead = WeightPrefetch(base.read, device) if device.type == "cuda" else None

    def fill(self, names: Iterable[str], device: torch.device | None = None) -> None:
        """Load parameters by name. Raises CalibrationError for one that is not stored."""
        keys = self._stored_for(names)
        stored = self.ahead.take(keys) if self.ahead is not None else {}
        stored = stored or {key: self.base.read(key) for key in keys}
        with quiet_transformers():
            self._fill(stored, self.bindings, device or self.device)
        self.fills += 1

    def fill_soon(self, names: Iterable[str]) -> None:
        """Let the stored tensors of parameters that are filled next be read meanwhile, where that is of use."""
        if self.ahead is not None:
            self.ahead.ask(self._stored_for(names))

    def _stored_for(self, names: Iterable[str]) -> list[str]:
        return [key for name in names if name in self.bindings for key in self.bindings[name].names]

    def empty(self, module: nn.Module) -> None:
        """Take the weights of a module and of all within it away again."""
        if self.ahead is not None:
            self.ahead.settle()  # it reads from what is closed here
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None and parameter.device.type != "meta":
                    part._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), False)
        self.base.weights.close()

    def names_in(self, prefix: str) -> list[str]:
        """Return the parameters (and stored buffers) within the module at `prefix`."""
        return [name for name in self.bindings if name.startswith(f"{prefix}.")]


def _filler(model: PreTrainedModel, dtype: torch.dtype) -> Fill:
    """Return fill(stored tensors, bindings, device), which puts them where they belong in the model."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig
    except ImportError:
        return _renaming_filler(model, dtype)
    mapping: Any = get_model_conversion_mapping(model)
    plan = model._get_dtype_plan(dtype) if hasattr(model, "_get_dtype_plan") else {}

    def fill(stored: Mapping[str, Tensor], _bindings: Mapping[str, Binding], device: torch.device) -> None:
        load_config = LoadStateDictConfig(
            device_map={"": str(device)}, dtype=dtype, dtype_plan=plan, weight_mapping=list(mapping)
        )
        info, _ = convert_and_load_state_dict_in_model(model, dict(stored), load_config)
        wrong = [*map(str, info.mismatched_keys), *map(str, info.conversion_errors), *info.error_msgs]
        if wrong:
            raise CalibrationError(f"The base's weights do not fit its class in transformers: {wrong[0]}.")

    return fill


def _renaming_filler(model: PreTrainedModel, dtype: torch.dtype) -> Fill:
    """The same for versions of transformers that only rename."""
    from accelerate.utils import set_module_tensor_to_device

    def fill(stored: Mapping[str, Tensor], bound: Mapping[str, Binding], device: torch.device) -> None:
        for name, binding in bound.items():
            if binding.names[0] in stored:
                value = stored[binding.names[0]]
                kind = dtype if value.is_floating_point() else None
                set_module_tensor_to_device(model, name, str(device), value=value, dtype=kind)

    return fill


@contextmanager
def filling_outside(skeleton: Skeleton, inside: str, limit: int) -> Iterator[None]:
    """Load every module outside of the stack `inside` when it is first called, and keep it while the block runs.

    Tables of tokens larger than `limit` bytes stay in the host's memory, mapped from the file, and are looked up there.
    """
    handles, patched = [], []
    head = output_head(skeleton.model)
    for path, module in skeleton.model.named_modules():
        tensors = [
            f"{path}.{n}" if path else n for n, p in module.named_parameters(recurse=False) if p.device.type == "meta"
        ]
        if not tensors or module is head or path == inside or path.startswith(f"{inside}."):
            continue
        table = isinstance(module, nn.Embedding) and module.weight.numel() * module.weight.element_size() > limit
        on_host = table and skeleton.device.type != "cpu"
        place = torch.device("cpu") if on_host else skeleton.device

        def fill(module: nn.Module, _: object, tensors: list[str] = tensors, place: torch.device = place) -> None:
            if any(p.device.type == "meta" for p in module.parameters(recurse=False)):
                skeleton.fill(tensors, place)

        handles.append(module.register_forward_pre_hook(fill))
        if on_host:
            _look_up_on_host(module, skeleton.device)
            patched.append(module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in patched:
            del module.forward


def _look_up_on_host(module: nn.Module, device: torch.device) -> None:
    inner = module.forward
    module.forward = lambda ids, *rest: inner(ids.cpu(), *rest).to(device)  # type: ignore[method-assign]
