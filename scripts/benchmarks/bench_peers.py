"""Peers for scripts/benchmarks/bench_merge.py: the same merges in plain torch, on whole models in memory.

`widen` is the published algorithm's expressions on whole bf16 tensors; `relax` is the original's way, two models loaded
with transformers. Each reads BASE and MODELS and saves the result under OUT.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import Parser, run


def widen(base: Path, models: list[Path], out: Path) -> None:
    """All models in memory, merged tensor by tensor."""
    from safetensors.torch import load_file, save_file

    from merging.methods.widen import reference

    theta_0, *tuned = ({k: v.clone() for k, v in load_file(f / "model.safetensors").items()} for f in (base, *models))
    merged = {
        name: reference(
            tensor,
            [model[name] for model in tuned],
            above_average_value_ratio=1.0,
            score_calibration_value=1.0,
            is_in_out=name == "model.embed_tokens.weight",
        )
        for name, tensor in theta_0.items()
    }
    out.mkdir(parents=True, exist_ok=True)
    save_file(merged, out / "model.safetensors")


def relax(base: Path, models: list[Path], out: Path) -> None:
    """Base and merged model as transformers' modules, relaxed in place and saved; models: merged, importance."""
    import torch
    from transformers import AutoModelForCausalLM

    from aim.importance import Importance
    from aim.relax import relax_reference

    merged, importance = models
    theta_0 = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.bfloat16, trust_remote_code=False)
    activations = Importance.load(importance).activations
    base_parameters = dict(theta_0.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in activations:
                parameter.copy_(relax_reference(base_parameters[name], parameter, activations[name], 0.4))
    model.save_pretrained(out)


PEERS = {"widen": widen, "relax": relax}


def main(argv: Sequence[str]) -> int:
    """Run one peer."""
    p = Parser(prog="scripts/benchmarks/bench_peers.py", description=(__doc__ or "").splitlines()[0])
    p.add_argument("peer", choices=PEERS, help="the merge or relaxation to run")
    p.add_argument("base", type=Path, metavar="BASE", help="folder of the base")
    p.add_argument("models", metavar="MODELS", help="folders separated by commas; relax: merged model, importance file")
    p.add_argument("out", type=Path, metavar="OUT", help="folder to write to")
    args = p.parse_args(argv)
    PEERS[args.peer](args.base, [Path(model) for model in args.models.split(",")], args.out)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
