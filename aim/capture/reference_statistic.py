"""The original's statistic: per module with a weight, the bf16 mean of |input| of each block, added up in bf16.

It goes by the names of modules, one block at a time; what it does not see stays unmeasured. Only for
`--numerics reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from aim.capture.statistics import Activations
from common.errors import CalibrationError
from common.logging import hides_progress


def measured_axis(module: nn.Module) -> int | None:
    """Return the axis of `module.weight` that its input channels run along, or None for what is not measured.

    Embeddings have no activation; the original breaks on convolutions. Conv1D's axis 0 is ours: the original has it
    wrong.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or isinstance(module, nn.Embedding):
        return None
    if type(module).__name__ == "Conv1D":
        return 0
    return weight.dim() - 1 if weight.dim() in (1, 2) else None


def collect(model: nn.Module, blocks: Tensor) -> Activations:
    """Run the base over calibration blocks (n_blocks, block_size), one at a time, with the original's arithmetic.

    The means are sums over blocks, whose ratio is the same. Raises CalibrationError where they are not finite.
    """
    sums: dict[str, Tensor] = {}
    axes: dict[str, int] = {}
    tokens: dict[str, int] = {}

    def hook(name: str, channels: int) -> Callable[[nn.Module, Sequence[object], Mapping[str, object]], None]:
        def observe(_module: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
            x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
            if x is None or not x.is_floating_point() or x.shape[-1] != channels:
                return
            mean = x.detach().reshape(-1, channels).abs().mean(0)
            sums[name] = sums[name] + mean if name in sums else mean
            tokens[name] = tokens.get(name, 0) + x.numel() // channels

        return observe

    handles = []
    for name, module in model.named_modules():
        axis = measured_axis(module)
        if axis is not None and "embed" not in name:
            weight = f"{name}.weight"
            axes[weight] = axis
            channels = module.weight.shape[axis]  # type: ignore[index, union-attr]
            handles.append(module.register_forward_pre_hook(hook(weight, channels), with_kwargs=True))
    device = next(model.parameters()).device
    try:
        with torch.inference_mode():
            for block in tqdm(blocks.split(1), desc="calibrating", disable=hides_progress()):
                model(block.to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for name, total in sums.items():
        if not torch.isfinite(total).all():
            raise CalibrationError(f"The base's activations into {name} are not finite.")
    means = {name: total.float().cpu() for name, total in sums.items()}
    return Activations(means, {name: axes[name] for name in means}, tokens, dict.fromkeys(means))
