"""Load check of a planned adapter in PEFT: on the meta device, names and shapes, without weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from common.errors import CheckpointError
from common.files.json_values import JsonValue
from merging.lora.layout import AdapterPlan


def check_adapter_loads(
    layout: AdapterPlan, settings: Mapping[str, JsonValue], config: Mapping[str, JsonValue]
) -> str | None:
    """Load the planned adapter over a base of that config (with the result's vocabulary), both without weights.

    Returns None where all is well, or the sentence on why it could not be tried. Raises CheckpointError where PEFT
    would find tensors missing, unexpected or of another shape.
    """
    try:
        import peft
        import transformers
    except ImportError as error:
        return f"Loading was not tried: {error.name} is not installed (pip install peft transformers)."
    import torch

    from common.quiet_transformers import quiet_transformers

    names = config.get("architectures") or []
    cls: Any = getattr(transformers, names[0], None) if names else None
    if cls is None:
        what = names[0] if names else "the architecture, which config.json does not name,"
        return f"Loading was not tried: {what} is not in transformers {transformers.__version__}."
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                model = cls(cls.config_class.from_dict(dict(config)))
                fields = {key: value for key, value in settings.items() if key in peft.LoraConfig.__dataclass_fields__}
                adapted = peft.get_peft_model(model, peft.LoraConfig(**{**fields, "inference_mode": True}))
                tensors = {e.name: torch.empty(e.shape, dtype=getattr(torch, e.dtype)) for e in layout.tensors}
                keys: Any = peft.set_peft_model_state_dict(adapted, tensors, low_cpu_mem_usage=True)
        except Exception as error:
            text = " ".join(str(error).split())
            raise CheckpointError(f"The result would not load in PEFT {peft.__version__}: {text[:300]}.") from error
    lacking = [key for key in keys.missing_keys if ".default." in f"{key}."]  # what belongs to the adapter of that name
    for kind, wrong in (("unexpected", keys.unexpected_keys), ("missing", lacking)):
        if wrong:
            names = ", ".join(sorted(wrong)[:3])
            raise CheckpointError(f"The result would not load in PEFT {peft.__version__} ({kind}: {names}).")
    return None
