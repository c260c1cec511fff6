"""Configuration of AIM, from flags, a YAML or a lock: omegas, measurement of importance, and rules of relaxation."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from aim.calibration.config import Calibration
from aim.calibration.flags import add_calibration_flags, calibration_of
from aim.measure import CALIBRATION_MODES, PLACES, Settings
from aim.omegas import check_omegas, parse_omegas
from aim.relaxer import Rule
from aim.scaling import CONTROLS, NORMALIZATIONS, QUANTILE, Scaling
from aim.statistics import DEFAULT, statistic_names
from common.errors import UsageError
from common.files.json_values import JsonObject, JsonValue
from common.files.paths import user_path
from common.terminal_text import quoted
from merging.recipe import DTYPES

if TYPE_CHECKING:
    from merging.plan.merge_plan import RelaxationLineage

SEED = "calibration_seed"
CALIBRATION = {"source": "calibration", "split": "calibration_split", "weights": "calibration_weights", "seed": SEED}
"""Fields of a Calibration that are not called as their keys are."""
SETTINGS = {"importance_file": "importance"}
"""The same of Settings."""
RULE = {"include": "relax_include", "exclude": "relax_exclude"}
"""The same of Rule: beside a merge, --exclude says what is not merged."""


@dataclass(frozen=True)
class AimConfig:
    """Configuration of AIM: one omega or several, how importance is measured and scaled, and what is relaxed."""

    omegas: tuple[float, ...]
    settings: Settings
    rule: Rule = field(default_factory=Rule)
    scaling: Scaling = field(default_factory=Scaling)

    @classmethod
    def from_mapping(
        cls, values: Mapping[str, JsonValue], *, reference: bool = False, resume: bool = False, seed: str = SEED
    ) -> AimConfig:
        """Return the configuration that keys of flags, a YAML or a lock give.

        Args:
            values: by key; None or a missing key is at its default, omega must be there.
            reference: the original's arithmetic.
            resume: continue an interrupted calibration.
            seed: key of the calibration's seed.

        Raises:
            UsageError: for values that cannot be.
        """
        settings = settings_of(values, reference=reference, resume=resume, seed=seed)
        scaling = Scaling(**{name: values[name] for name in vars(Scaling()) if values.get(name) is not None})
        config = cls(parse_omegas(values["omega"]), settings, rule_of(values, reference), scaling)
        config.check()
        return config

    def check(self) -> None:
        """Raise UsageError for values that cannot be."""
        check_omegas(self.omegas)
        self.rule.check()
        self.scaling.check()
        self.settings.check()
        if self.settings.reference and self.scaling != Scaling():
            raise UsageError(
                "--numerics reference computes the original's AIM alone; leave out --normalization and --control."
            )

    def label(self) -> RelaxationLineage:
        """Return what a lineage records besides omega: what differs from the paper's AIM."""
        statistic = self.settings.statistic
        uses_it = statistic != DEFAULT and self.scaling.control != "weight_norm"
        label: RelaxationLineage = {"statistic": statistic} if uses_it else {}
        label.update(self.scaling.label())
        return label

    @property
    def files(self) -> dict[str, Path]:
        """Files that the result depends on besides the checkpoints."""
        file = self.settings.importance_file
        return {"importance": file} if file else {}

    @property
    def protected(self) -> list[Path]:
        """Paths that the output must not touch."""
        return [*self.files.values(), *self.settings.calibration.files()]

    def as_recipe(self) -> JsonObject:
        """Return the keys that `from_mapping` takes, without omega: what is not at its default."""
        settings = self.settings
        file = settings.importance_file
        keys: JsonObject = {"importance": str(file.resolve())} if file else {}
        for config, default, names, excluded in (
            (settings.calibration.lasting(), Calibration(), CALIBRATION, ()),
            (settings, Settings(Calibration()), SETTINGS, ("calibration", "importance_file", "reference", "resume")),
            (self.rule, Rule(), RULE, ()),
            (self.scaling, Scaling(), {}, ()),
        ):
            for entry in fields(config):  # type: ignore[arg-type]
                value = getattr(config, entry.name)
                if entry.name not in excluded and value != getattr(default, entry.name):
                    keys[names.get(entry.name, entry.name)] = list(value) if isinstance(value, tuple) else value
        return keys


def add_aim_flags(
    parser: argparse.ArgumentParser, seed: str, prefix: str = "", omega: str | None = None, title: str = "AIM"
) -> None:
    """Add the flags about importance and relaxed tensors; None (or False) where they are not given.

    Args:
        parser: gets the groups "AIM", "importance of the base" and "calibration text".
        seed: name of the flag for the seed of the calibration text's shuffling.
        prefix: of --include and --exclude.
        omega: default of --omega as the help prints it; None for a script without --omega.
        title: of the first group.
    """
    group = parser.add_argument_group(title)
    if omega is not None:
        group.add_argument(
            "--omega",
            metavar="X or X,Y,Z",
            help="relaxation floor from 0 (strongest) to 1 (leaves the merge); several make a folder each, from one "
            f"read (default: {omega})",
        )
    group.add_argument(f"--{prefix}include", metavar="REGEX", help="relax only tensors whose name matches")
    group.add_argument(f"--{prefix}exclude", metavar="REGEX", help="leave tensors whose name matches as merged")
    group.add_argument("--keep_base", metavar="REGEX", help="keep the base's tensors whose name matches")
    group.add_argument(
        "--relax_tied",
        action="store_true",
        default=None,
        help="relax a tied embedding, as the output head",
    )
    group.add_argument(
        "--min_tokens",
        type=int,
        metavar="N",
        help=f"leave experts as merged that fewer calibration tokens were routed to (default: {Rule.min_tokens})",
    )
    group = parser.add_argument_group("importance of the base")
    group.add_argument(
        "--importance",
        type=user_path,
        metavar="FILE",
        help="reuse this importance file of the base, or measure it and save it there",
    )
    group.add_argument(
        "--statistic",
        choices=statistic_names(),
        help=f"statistic of the base's input per channel (default: {DEFAULT}, the paper's)",
    )
    group.add_argument(
        "--calibration_mode",
        choices=CALIBRATION_MODES,
        help="run the whole base, or one layer at a time in little memory (default: auto, the whole where it fits)",
    )
    group.add_argument(
        "--hidden_states", choices=PLACES, help="place of the hidden states in a layerwise calibration (default: auto)"
    )
    group.add_argument(
        "--batch_size",
        metavar="N|auto",
        help="calibration blocks at a time (default: auto; halved where they do not fit)",
    )
    group.add_argument(
        "--calibration_dtype",
        choices=("auto", *DTYPES),
        help="dtype of the base in calibration (default: auto, as it is stored; float32 if the CPU emulates bfloat16)",
    )
    add_calibration_flags(parser, seed)


def add_scaling_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags about s: its normalization, and the controls; None where they are not given."""
    group = parser.add_argument_group("AIM's importance s, and controls for experiments")
    group.add_argument(
        "--normalization",
        choices=tuple(NORMALIZATIONS),
        help=f"{'; '.join(f'{name}: {text}' for name, text in NORMALIZATIONS.items())} (default: max)",
    )
    group.add_argument(
        "--quantile", type=float, metavar="Q", help=f"with --normalization quantile (default: {QUANTILE:g})"
    )
    group.add_argument(
        "--control",
        choices=tuple(CONTROLS),
        help=f"instead of AIM, what tells whether the activations matter. "
        f"{'; '.join(f'{name}: {text}' for name, text in CONTROLS.items())}",
    )
    group.add_argument("--control_seed", type=int, metavar="N", help="seed of permuted and random (default: 0)")


KEYS = (
    "omega", "statistic", "normalization", "quantile", "control", "control_seed", "importance", "relax_include",
    "relax_exclude", "keep_base", "relax_tied", "min_tokens",
    "calibration_mode", "hidden_states", "batch_size", "calibration_dtype", "calibration", "calibration_weights",
    "calibration_split", "text_field", "n_samples", "block_size", SEED,
)  # fmt: skip
"""Keys that flags, a YAML and a lock may give."""


def settings_of(values: Mapping[str, JsonValue], *, reference: bool, resume: bool, seed: str) -> Settings:
    """Return how importance is to be measured, by the same keys. Raises UsageError for values that cannot be."""
    importance = values.get("importance")
    named = ("calibration_dtype", "calibration_mode", "hidden_states", "statistic")
    settings = Settings(
        calibration=calibration_of(values, seed),
        importance_file=None if importance is None else user_path(str(importance)),
        batch_size=_batch_size(values.get("batch_size")),
        reference=reference,
        resume=resume,
        **{key: values[key] for key in named if values.get(key) is not None},
    )
    settings.check()
    return settings


def rule_of(values: Mapping[str, JsonValue], reference: bool) -> Rule:
    """Return what is to be relaxed, by the same keys. Raises UsageError for values that cannot be."""
    named = {field: RULE[field] if values.get(RULE.get(field, "")) is not None else field for field in vars(Rule())}
    rule = Rule(**{field: values[key] for field, key in named.items() if values.get(key) is not None})
    if reference:
        rule = Rule(**{**vars(rule), "relax_tied": True})
    rule.check(named)
    return rule


def _batch_size(value: object) -> int | None:
    """A number of blocks; None for auto."""
    if value is None or value == "auto":
        return None
    try:
        return int(str(value))
    except ValueError:
        raise UsageError(f"--batch_size must be a number of blocks or auto, found {quoted(value)}.") from None
