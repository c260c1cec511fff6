"""Roles of tensors by name and shape: embedding, output head, layer, model part; no list of architectures."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from common.errors import UsageError, nearest

INPUT_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens(_per_layer)?|tok_embeddings|tokens_embed|token_embedding|word_embeddings?|embed_in|wte|shared"
    r"|embeddings?)\.weight$"
)
HEADS = (
    r"(^|\.)(lm_head(\.decoder)?|embed_out|output(_layer)?|head|ff_out|proj_out|lm_loss|pred_layer\.proj"
    r"|predictions(\.decoder)?|vocab_projector|generator_lm_head)"
)
OUTPUT_HEAD = re.compile(HEADS + r"\.weight$")
VOCABULARY_BIAS = re.compile(HEADS + r"\.bias$")
"""These three match the end of a name, whole words between dots, so that `position_embeddings`,
`token_type_embeddings`, `patch_embed`, `wpe` and `embed_positions` do not match. They apply outside layers and outside
vision and audio towers only."""
COMPUTED_BUFFER = re.compile(r"(\.inv_freq|(attn|attention)\.(masked_)?bias|\.position_ids)$")
"""Buffers that old checkpoints store and transformers recomputes; some models have them and others do not."""
LAYER = re.compile(r"^(?P<stack>(?:.*?\.)?(?:layers?|h|blocks?)\.)(?P<index>\d+)(?P<rest>\..+)$")
EXPERTS = re.compile(r"expert|moe")
PARTS = {
    "multi_modal_projector": re.compile(r"projector|connector|merger"),
    "vision_tower": re.compile(r"(^|\.)(vision\w*|visual|image\w*)\."),
    "audio_tower": re.compile(r"(^|\.)audio\w*\."),
    "encoder": re.compile(r"(^|\.)encoder\."),
}
"""Parts of a model by a word in the tensor name; the rest is the decoder."""
DECODERS = ("text_decoder", "decoder")


def role_of(name: str) -> str | None:
    """Return "input", "head" or "bias" for input embedding, output head and its bias; None for other tensors."""
    if layer_of(name) or PARTS["vision_tower"].search(name) or PARTS["audio_tower"].search(name):
        return None
    patterns = {"input": INPUT_EMBEDDING, "head": OUTPUT_HEAD, "bias": VOCABULARY_BIAS}
    return next((role for role, pattern in patterns.items() if pattern.search(name)), None)


def main_embedding(names: Iterable[str]) -> str | None:
    """Return the name of the language model's input embedding; None where no tensor is one.

    Of several candidates the one with the fewest dots in its name wins (`shared` in T5), per-layer embeddings last.
    """
    candidates = [name for name in names if role_of(name) == "input"]
    return min(candidates, key=lambda name: ("per_layer" in name, name.count("."), len(name)), default=None)


def is_computed(name: str, shape: Sequence[int]) -> bool:
    """Return True for a buffer that transformers recomputes (masks, `inv_freq`); a learned bias has one dimension."""
    return bool(COMPUTED_BUFFER.search(name)) and (len(shape) != 1 or not name.endswith("bias"))


def layer_of(name: str) -> tuple[str, int, str] | None:
    """Return (stack, index, rest) of a tensor in a layer: "model.layers.", 3, ".mlp.up_proj.weight"; None elsewhere."""
    match = LAYER.match(name)
    return (match["stack"], int(match["index"]), match["rest"]) if match else None


def in_order(name: str) -> list[tuple[int, str]]:
    """Return a sort key for tensor names that puts layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def stacks_experts(name: str, shape: Sequence[int]) -> bool:
    """Return True for the stacked matrices of the experts of a mixture: (experts, rows, columns)."""
    return len(shape) == 3 and bool(EXPERTS.search(name))


def stacks_of(names: Iterable[str]) -> dict[str, int]:
    """Return {stack: number of layers} over the names of a checkpoint."""
    depths: Counter[str] = Counter()
    for name in names:
        if layer := layer_of(name):
            depths[layer[0]] = max(depths[layer[0]], layer[1] + 1)
    return dict(depths)


def in_part(name: str, part: str | None) -> bool:
    """Return True where a tensor belongs to a part of the model.

    Args:
        name: The tensor's name.
        part: "text_decoder", "vision_tower" or another entry of PARTS or DECODERS; None or "default" for the whole
            model.

    Raises:
        UsageError: The part is unknown.
    """
    if part in (None, "default"):
        return True
    if part in DECODERS:
        words = [word for word in PARTS if word != "encoder" or part == "decoder"]
        return not any(PARTS[word].search(name) for word in words)
    if part not in PARTS:
        parts = [*PARTS, *DECODERS, "default"]
        raise UsageError(f"modules has no part {part!r}.{nearest(part, parts)} Known: {', '.join(parts)}.")
    first = next((word for word, pattern in PARTS.items() if pattern.search(name)), None)
    return first == part


def transposed_names(shapes: Mapping[str, tuple[int, ...]]) -> frozenset[str]:
    """Return the names of the matrices stored [in, out], as GPT-2's Conv1D stores them.

    A bias has one entry per output. A stack of layers is stored [in, out] where the bias has the length of axis 1 in at
    least one non-square matrix and that of axis 0 in none; its square matrices count as [in, out] too.

    Args:
        shapes: {tensor name: shape} of the checkpoint.
    """
    axes: dict[str, dict[str, set[int]]] = defaultdict(dict)
    for name, shape in shapes.items():
        bias, layer = shapes.get(f"{name.removesuffix('weight')}bias"), layer_of(name)
        if layer and name.endswith(".weight") and len(shape) == 2 and bias is not None and len(bias) == 1:
            axes[layer[0]][name] = {axis for axis in (0, 1) if shape[axis] == bias[0]}
    stacks = [stack for stack in axes.values() if {1} in stack.values() and {0} not in stack.values()]
    return frozenset(name for stack in stacks for name in stack)
