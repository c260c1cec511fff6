"""What a tensor is, told from its name: embedding, output head, layer, part of a multi-part model. No architectures."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from console.errors import UsageError, nearest

INPUT_EMBEDDING = re.compile(r"(embed_tokens|embed_in|wte|word_embeddings|shared)\.weight$")
OUTPUT_HEAD = re.compile(r"(lm_head|embed_out)\.weight$")
VOCABULARY_TENSOR = re.compile(r"(embed|wte|word_embeddings|lm_head|shared|output)[\w.]*\.?(weight|bias)$")
ALWAYS_VOCABULARY = re.compile(r"(embed_tokens|lm_head|wte|embed_in|embed_out)\.weight$")
COMPUTED_BUFFER = re.compile(r"(rotary_emb\.inv_freq|attn\.(masked_)?bias)$")
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


def layer_of(name: str) -> tuple[str, int, str] | None:
    """Return (stack, index, rest) of a tensor in a layer: "model.layers.", 3, ".mlp.up_proj.weight"; None elsewhere."""
    found = LAYER.match(name)
    return (found["stack"], int(found["index"]), found["rest"]) if found else None


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
