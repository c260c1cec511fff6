"""PEFT's names of an adapter's tensors, and the base's tensors that they belong to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from common.errors import CheckpointError

PREFIX = "base_model.model."
FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.(?!weight$|bias$)[^.]+)?"
    r"(?(embedding)(\.weight)?|\.weight)"
)
"""`module.lora_A.weight`, `module.lora_A.default.weight` (with the adapter's name), `module.lora_embedding_A`."""
WRAPPERS = re.compile(r"\.modules_to_save\.default\.|\.modules_to_save\.|\.base_layer\.")
MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.(?!weight$)[^.]+)?(\.weight)?")
LORA_BIAS = re.compile(r"(?P<module>.+)\.lora_B(\.(?!bias$)[^.]+)?\.bias")
TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(\.[^.]+)?")
FROZEN = ".original_module."
"""PEFT's copy of a module of the base that modules_to_save replaces; it has no effect."""
REFUSED = {"lora_": "a variant of LoRA"}


@dataclass(frozen=True)
class Pair:
    """Keys of A and B, and the name of their module."""

    a: str
    b: str
    module: str

    @property
    def embedding(self) -> bool:
        """True for an embedding, to which the transpose is added: theta + scaling * (B A)^T."""
        return ".lora_embedding_" in self.a


@dataclass(frozen=True)
class AdapterKeys:
    """Tensors of an adapter by purpose; names are those of the model's parameters, keys those in the adapter's file.

    Attributes:
        pairs: {weight name: A and B}.
        whole: {name: key of the tensor that replaces it} (modules_to_save, resized embeddings, biases).
        magnitudes: {weight name: key of the DoRA magnitude vector}.
        biases: {bias name: key of the bias that is added} (lora_bias).
        tokens: {embedding name: key of its trained rows} (trainable_token_indices).
    """

    pairs: Mapping[str, Pair]
    whole: Mapping[str, str]
    magnitudes: Mapping[str, str]
    biases: Mapping[str, str]
    tokens: Mapping[str, str]

    @classmethod
    def sort(cls, label: str, keys: Iterable[str]) -> AdapterKeys:
        """Sort the keys of an adapter by purpose. Raises CheckpointError for an unknown key."""
        sides: dict[str, dict[str, str]] = {}
        whole: dict[str, str] = {}
        by_kind: dict[str, dict[str, str]] = {"magnitude": {}, "bias": {}, "tokens": {}}
        for key in keys:
            name = key.removeprefix(PREFIX)
            if FROZEN in name:
                continue
            kinds = (("magnitude", MAGNITUDE, "weight"), ("bias", LORA_BIAS, "bias"), ("tokens", TOKENS, "weight"))
            special = next(((k, m["module"], end) for k, p, end in kinds if (m := p.fullmatch(name))), None)
            if special:
                kind, module, end = special
                by_kind[kind][f"{WRAPPERS.sub('.', module + '.')}{end}"] = key
                continue
            if factor := FACTOR.fullmatch(name):
                side = sides.setdefault(factor["module"], {})
                if factor["side"] in side:
                    raise CheckpointError(
                        f"Adapter {label} holds two adapters in one file: {side[factor['side']]}, {key}."
                    )
                side[factor["side"]] = key
                continue
            variant = next((what for part, what in REFUSED.items() if part in name), None)
            if variant or not name.endswith((".weight", ".bias")):
                what = f" ({variant})" if variant else ""
                raise CheckpointError(
                    f"Adapter {label} holds {key}{what}, which is not supported; merge it with PEFT first."
                )
            plain = WRAPPERS.sub(".", name)
            if plain not in whole or plain == name:  # of a module saved twice PEFT loads the plain name
                whole[plain] = key
        nested = {module for module in sides if ".base_layer" in module and module.replace(".base_layer", "") in sides}
        for side in sides.values():
            if len(side) < 2:
                raise CheckpointError(f"Adapter {label} holds only {next(iter(side.values()))} of the pair A, B.")
        pairs = {
            f"{WRAPPERS.sub('.', module + '.') if module not in nested else module + '.'}weight": Pair(
                side["A"], side["B"], module
            )
            for module, side in sides.items()
        }
        return cls(pairs, whole, by_kind["magnitude"], by_kind["bias"], by_kind["tokens"])


def find_stored(name: str, stored: Iterable[str]) -> str | None:
    """Return the stored name of a model parameter; None where no stored name matches, or several do.

    Leading components (`model.`) may be missing, additional or in another order; layer numbers must agree.
    """
    names = stored if isinstance(stored, Mapping) else dict.fromkeys(stored)
    if name in names:
        return name
    ends = _ends(tuple(names))
    for prefix, end in _cuts(name):
        numbered = any(part.isdigit() for part in end.split("."))
        shared = {whole: len(set(prefix) & set(lead)) for lead, whole in ends.get(end, ())}
        fitting = [w for lead, w in ends.get(end, ()) if shared[w] or numbered or not lead or not prefix]
        best = [whole for whole in fitting if shared[whole] == max(shared[w] for w in fitting)]
        if best:
            return best[0] if len(best) == 1 else None
    return None


def _cuts(name: str) -> list[tuple[tuple[str, ...], str]]:
    """Return all splits of a dotted name into components without a number and an end of two or more components."""
    parts = name.split(".")
    cuts = []
    for i in range(len(parts) - 1):
        cuts.append((tuple(parts[:i]), ".".join(parts[i:])))
        if parts[i].isdigit():
            break
    return cuts


@lru_cache(maxsize=4)
def _ends(stored: tuple[str, ...]) -> dict[str, list[tuple[tuple[str, ...], str]]]:
    """Return {end of a name: [(leading components, whole name)]}."""
    ends: dict[str, list[tuple[tuple[str, ...], str]]] = {}
    for name in stored:
        for prefix, end in _cuts(name):
            ends.setdefault(end, []).append((prefix, name))
    return ends
