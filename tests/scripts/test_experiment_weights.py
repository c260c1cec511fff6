"""Deletion of scored weights by several runners at once."""

from __future__ import annotations

import threading
from pathlib import Path

from scripts.experiments.plan import plan_experiment
from scripts.experiments.schema import read_experiment
from scripts.experiments.state import State, Status
from scripts.experiments.weights import delete_scored

ROUNDS, RUNNERS, FILES = 5, 4, 300
ROOT = Path(__file__).resolve().parents[2]


def test_runners_that_end_together_delete_the_same_weights(tmp_path: Path) -> None:
    """Runners whose cells are the last two users of a merge delete its weights together, without an error."""
    plan = plan_experiment(read_experiment(ROOT / "configs" / "experiments" / "quickstart.yaml"), tmp_path)
    state = State(tmp_path)
    merge = next(cell for cell in plan.cells if cell.section == "merge")
    users = plan.users(merge.name)
    for user in users:
        state.write(user, Status("done"))
    assert merge.weights is not None
    errors: list[BaseException] = []

    def delete(start: threading.Barrier) -> None:
        start.wait()
        try:
            delete_scored(plan, state, users[0])
        except BaseException as error:
            errors.append(error)

    for _ in range(ROUNDS):
        merge.weights.mkdir(parents=True)
        for number in range(FILES):
            (merge.weights / f"{number}.safetensors").touch()
        start = threading.Barrier(RUNNERS)
        runners = [threading.Thread(target=delete, args=(start,)) for _ in range(RUNNERS)]
        for runner in runners:
            runner.start()
        for runner in runners:
            runner.join()
        assert not errors
        assert not merge.weights.exists()
