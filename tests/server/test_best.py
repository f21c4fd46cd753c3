"""The best round's adapter is kept beside the last one's, also by a run that dies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lalora_flwr.audit.verify import verify
from lalora_flwr.engines.inline import run_inline
from lalora_flwr.ground.errors import RunFailed
from lalora_flwr.server.best import Best
from lalora_flwr.server.metrics import RoundMetrics
from tests.conftest import Finished, small, strict_json

WORSE = {"num_rounds": 4, "train__lr": 30.0}  # so long a step that the first round is best


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture
def run(finished: Callable[..., Finished]) -> Finished:
    return finished(**WORSE)


def test_the_summary_names_the_best_of_the_rounds(run: Finished) -> None:
    scores = [line["accuracy"] for line in run.metrics]
    best = max(range(4), key=lambda t: (scores[t], t))
    assert best < 3, "the test wants a run that ends lower than it was"
    assert run.summary["best_round"] == best + 1 and run.summary["best_accuracy"] == scores[best]
    assert run.summary["accuracy"] == scores[3]


def test_its_folder_is_that_rounds_adapter(run: Finished, tmp_path: Path) -> None:
    """As a run of as many rounds would have ended, at the same noise."""
    rounds = run.summary["best_round"]
    shorter = run_inline(small(tmp_path, **{**WORSE, "num_rounds": rounds}, privacy__max_rounds=4))
    for name, value in weights(shorter / "adapter").items():
        assert torch.equal(value, weights(run.path / "best")[name])
        assert torch.equal(value, weights(run.path / "adapter")[name]) == ("lora_A" not in name and "lora_B" not in name)
    card = (run.path / "best" / "README.md").read_text(encoding="utf-8")
    assert f"after round {rounds}, chosen as the best" in card and f"{run.summary['best_accuracy']:.4f}" in card


def test_no_folder_where_the_last_round_is_best(finished: Callable[..., Finished]) -> None:
    run = finished(num_rounds=1)
    assert not (run.path / "best").exists() and "best_round" not in run.summary


def test_the_certificate_is_about_it(run: Finished) -> None:
    list(verify(run.path))
    other = run.path / "best" / "more.safetensors"
    save_file({}, other)
    try:
        with pytest.raises(RunFailed, match="added after the run ended"):
            list(verify(run.path))
    finally:
        other.unlink()


class Killed(BaseException):
    """Ends a run where it is."""


@pytest.mark.parametrize("rounds", [1, 2, 3, 4])
def test_a_resumed_run_keeps_the_same(run: Finished, tmp_path: Path, rounds: int) -> None:
    def on_round(line: RoundMetrics) -> None:
        if line.round == rounds:
            raise Killed

    settings = small(tmp_path, **WORSE)
    with pytest.raises(Killed):
        run_inline(settings, on_round)
    folder = run_inline(small(tmp_path, **WORSE, resume=True))
    summary = strict_json((folder / "summary.json").read_text())
    assert (summary["best_round"], summary["best_accuracy"]) == (run.summary["best_round"], run.summary["best_accuracy"])
    assert (folder / "best" / "adapter_model.safetensors").read_bytes() == (
        run.path / "best" / "adapter_model.safetensors"
    ).read_bytes()
    assert len(list((folder / "checkpoint").glob("best-*"))) == 1


def test_rounds_that_were_not_evaluated_or_diverged_are_no_candidates(tmp_path: Path) -> None:
    best = Best(tmp_path / "checkpoint")
    for number, score in enumerate([None, 0.4, float("nan"), 0.3, 0.4, None], 1):
        best.look(number, {"accuracy": score, "loss": 1.0}, {"w": torch.full((2,), float(number))})
    assert best.round == 5 and best.quality["accuracy"] == 0.4  # of two alike the later
    assert torch.equal(best.adapter()["w"], torch.full((2,), 5.0))
    again = Best(tmp_path / "checkpoint")
    again.restore(best.state())
    again.tidy()
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["best-5.safetensors"]
    (tmp_path / "checkpoint" / "best-5.safetensors").write_bytes(b"no tensors")
    with pytest.raises(RunFailed, match=r"best-5\.safetensors is damaged"):
        again.adapter()
