"""References to checkpoints: local folders, .gguf files and hub ids, with or without an adapter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from common.errors import UsageError
from common.files.json_values import JsonValue
from merging.checkpoints.headers import ADAPTER_FILES, Layout, adapter_layout, layout_of

COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*(/\w[\w.-]*)?)")
HUB_GGUF = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)/(?P<file>[\w./-]+\.gguf)")


@dataclass(frozen=True)
class CheckpointRef:
    """A model as users name it.

    Attributes:
        path: A local folder or .gguf file, or a hub id `org/name` or `org/name/file.gguf`.
        revision: Revision of a hub id, written `@revision`.
        adapter: The LoRA adapter that is added to it, written `+adapter`.
    """

    path: str
    revision: str | None = None
    adapter: CheckpointRef | None = None

    @classmethod
    def parse(cls, text: str) -> CheckpointRef:
        """Parse `model`, `model@revision` or `base+adapter`, each side with its own revision.

        A path that exists is taken whole, also where it contains @ or +.

        Raises:
            UsageError: A name is empty.
        """
        text = text.strip()
        sides = None if _is_local(text) else _split_adapter(text)
        if sides is None:
            return cls._one(text)
        return replace(cls._one(sides[0]), adapter=cls._one(sides[1]))

    @classmethod
    def _one(cls, text: str) -> CheckpointRef:
        if not text:
            raise UsageError(
                "A model name is empty; give a folder or a hub id such as org/name, with an adapter as base+adapter."
            )
        if _is_local(text) or "@" not in text:
            return cls(text)
        path, _, revision = text.rpartition("@")
        return cls(path, revision)

    @property
    def alone(self) -> CheckpointRef:
        """The reference without its adapter."""
        return replace(self, adapter=None)

    @property
    def is_hub_id(self) -> bool:
        """True for a name that is no local path and has the form of a hub id."""
        return not _is_local(self.path) and bool(HUB_ID.fullmatch(self.path) or HUB_GGUF.fullmatch(self.path))

    @property
    def repo(self) -> str:
        """The hub id without a file in it."""
        gguf = HUB_GGUF.fullmatch(self.path)
        return gguf["repo"] if gguf else self.path

    @property
    def file(self) -> str | None:
        """The .gguf file that is named within a hub id, if any."""
        gguf = HUB_GGUF.fullmatch(self.path)
        return gguf["file"] if gguf else None

    @property
    def full_name(self) -> str:
        """The hub id, or the local path made absolute so that it cannot be mistaken for a hub id."""
        model = str(self.alone) if self.is_hub_id else str(Path(self.path).expanduser().resolve())
        return f"{model}+{self.adapter.full_name}" if self.adapter else model

    def __str__(self) -> str:
        model = f"{self.path}@{self.revision}" if self.revision else self.path
        return f"{model}+{self.adapter}" if self.adapter else model


def local_paths(names: Iterable[str]) -> list[Path]:
    """Return the local folders and files among models as users name them, and among their adapters."""
    refs = [CheckpointRef.parse(name) for name in names]
    sides = [side for ref in refs for side in (ref, ref.adapter) if side is not None]
    return [Path(side.path).expanduser() for side in sides if _is_local(side.path)]


def _is_local(text: str) -> bool:
    return bool(text) and Path(text).expanduser().exists()


def _split_adapter(text: str) -> tuple[str, str] | None:
    """Split `base+adapter` at the + whose sides are most likely models (the last of equals).

    Returns None for a text without +, or where neither side can be a model.
    """
    cuts = [(text[: plus.start()], text[plus.end() :]) for plus in re.finditer(r"\+", text)]
    best = max(reversed(cuts), key=_likelihood, default=None)
    return best if best is not None and _likelihood(best) else None


def _likelihood(sides: tuple[str, str]) -> int:
    """Return a score of two texts as model names: 2 for each local path, 1 for each possible hub id."""
    refs = [CheckpointRef._one(side) for side in sides if side.strip()]
    return sum(2 if _is_local(ref.path) else int(ref.is_hub_id) for ref in refs)


@dataclass(frozen=True)
class Part:
    """A model without its adapter, or an adapter, whose small files are local and checked.

    Attributes:
        ref: Its reference.
        folder: Folder of its small files.
        place: The folder or .gguf file that the user named, or a folder of the hub's cache.
        config: Content of config.json, empty for a .gguf file; of adapter_config.json for an adapter.
        gguf: The .gguf file that holds the weights; None where they are in other formats.
        is_adapter: True for an adapter.
    """

    ref: CheckpointRef
    folder: Path
    place: Path
    config: Mapping[str, JsonValue] = field(compare=False)
    gguf: Path | None = None
    is_adapter: bool = False

    def layout(self, names: Sequence[str]) -> Layout:
        """Return its weight files among the folder's file names. Raises CheckpointError as `layout_of` does."""
        if self.ref.file:
            return Layout((self.ref.file,))
        return adapter_layout(names) if self.is_adapter else layout_of(self.folder, names)

    def no_weights(self, names: Iterable[str]) -> str:
        """Return the message for a model or adapter without weights among its file names."""
        if self.is_adapter:
            return f"Adapter {self.ref} holds no weights ({' or '.join(ADAPTER_FILES)})."
        gguf = sorted(name for name in names if name.endswith(".gguf"))
        if gguf:
            return f"{self.ref} holds .gguf files and no other weights; name one of them: {self.ref.path}/{gguf[0]}."
        return f"{self.ref} holds no weights (model.safetensors or pytorch_model.bin, whole or sharded)."

    @property
    def commit(self) -> str | None:
        """The commit of a model from the hub."""
        return self.folder.name if self.ref.is_hub_id and COMMIT.fullmatch(self.folder.name) else None

    @property
    def exact_name(self) -> str:
        """The local path made absolute, or the hub id with the commit."""
        return f"{self.ref.path}@{self.commit}" if self.commit else self.ref.full_name
