"""What a tensor is, told from its name: embedding, output head, layer, part of a multi-part model. No architectures."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

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
"""Ends of names, whole words between dots: `position_embeddings`, `token_type_embeddings`, `patch_embed`, `wpe` and
`embed_positions` are none of them. They mean the vocabulary only outside layers and outside what sees or hears."""
COMPUTED_BUFFER = re.compile(r"(\.inv_freq|(attn|attention)\.(masked_)?bias|\.position_ids)$")
"""Buffers that old checkpoints store and transformers recomputes; models may differ in having them."""
LAYER = re.compile(r"^(?P<stack>(?:.*?\.)?(?:layers?|h|blocks?)\.)(?P<index>\d+)(?P<rest>\..+)$")
EXPERTS = re.compile(r"expert|moe")
PARTS = {
    "multi_modal_projector": re.compile(r"projector|connector|merger"),
    "vision_tower": re.compile(r"(^|\.)(vision\w*|visual|image\w*)\."),
    "audio_tower": re.compile(r"(^|\.)audio\w*\."),
    "encoder": re.compile(r"(^|\.)encoder\."),
}
"""The parts of a model that are told by a word in the name; the rest is its decoder."""
DECODERS = ("text_decoder", "decoder")


def role_of(name: str) -> str | None:
    """Return "input", "head" or "bias" for what has an entry per token: input embedding, output head, the head's bias.

    None for every other tensor, whatever its number of rows.
    """
    if layer_of(name) or PARTS["vision_tower"].search(name) or PARTS["audio_tower"].search(name):
        return None
    patterns = {"input": INPUT_EMBEDDING, "head": OUTPUT_HEAD, "bias": VOCABULARY_BIAS}
    return next((role for role, pattern in patterns.items() if pattern.search(name)), None)


def main_embedding(names: Iterable[str]) -> str | None:
    """Return the input embedding of the language model among a checkpoint's tensors, whatever file it is in.

    Of several it is the one highest up, as `shared` in T5; per-layer embeddings come after all others.
    """
    found = [name for name in names if role_of(name) == "input"]
    return min(found, key=lambda name: ("per_layer" in name, name.count("."), len(name)), default=None)


def is_computed(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is a buffer that transformers recomputes: a mask, not a learnt bias, which has one dimension."""
    return bool(COMPUTED_BUFFER.search(name)) and (len(shape) != 1 or not name.endswith("bias"))


def layer_of(name: str) -> tuple[str, int, str] | None:
    """Return (stack, index, rest) of a tensor in a layer: "model.layers.", 3, ".mlp.up_proj.weight"; None elsewhere."""
    found = LAYER.match(name)
    return (found["stack"], int(found["index"]), found["rest"]) if found else None


def in_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts names with layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def stacks_experts(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor stacks the matrices of a mixture's experts (experts, rows, columns)."""
    return len(shape) == 3 and bool(EXPERTS.search(name))


def stacks_of(names: Iterable[str]) -> dict[str, int]:
    """Return {stack: number of layers} over the names of a checkpoint."""
    depths: Counter[str] = Counter()
    for name in names:
        if found := layer_of(name):
            depths[found[0]] = max(depths[found[0]], found[1] + 1)
    return dict(depths)


def in_part(name: str, part: str | None) -> bool:
    """Whether a tensor belongs to a part of the model ("text_decoder", "vision_tower", ...); None and "default" are the
    whole model.

    Raises UsageError for a part that is not known.
    """
    if part in (None, "default"):
        return True
    if part in DECODERS:
        others = [word for word in PARTS if word != "encoder" or part == "decoder"]
        return not any(PARTS[word].search(name) for word in others)
    if part not in PARTS:
        known = [*PARTS, *DECODERS, "default"]
        raise UsageError(f"modules has no part {part!r}.{nearest(part, known)} Known: {', '.join(known)}.")
    first = next((word for word, pattern in PARTS.items() if pattern.search(name)), None)
    return first == part
