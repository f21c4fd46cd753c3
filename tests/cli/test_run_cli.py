"""What `lalora plan`, `keys` and `run` print, and how runs that fail end."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict

from lalora_flwr.cli import main as cli
from lalora_flwr.cli import run as cli_run
from lalora_flwr.data import digits
from lalora_flwr.engines import inline
from lalora_flwr.ground.errors import SiteRefusal
from lalora_flwr.server import run as federation
from lalora_flwr.server.plan import make_plan
from lalora_flwr.settings import KEYS
from lalora_flwr.site.app import answer
from tests.cli.commands import NO_NOISE, Lalora, assert_one_line, pairs, real_lalora
from tests.conftest import AppCall, Spy, files_in, small, strict_json


def test_plan_prints_noise_rate_steps_epsilon_and_bytes_and_touches_no_record(
    lalora: Lalora, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def touched(*_: Any) -> Any:
        raise AssertionError("a record was touched")

    monkeypatch.setattr(digits, "all_records", touched)
    code, out, err = lalora("plan", "-c", pairs(output_dir="out"))
    assert (code, err) == (0, "")
    settings = small(tmp_path, num_supernodes=2)
    plan = make_plan(settings)
    assert re.search(rf"noise multiplier σ +{plan.mechanism.noise_multiplier:.4f} ", out)
    assert re.search(rf"sample rate q +{40 / 550:.4g} ", out)
    assert re.search(r"steps +2 rounds x 2 local steps; at most 4 a site", out)
    assert re.search(rf"bytes a round +{plan.bytes_down:,} down and {plan.bytes_up[0]:,} up", out)
    for served in (1, 2):
        assert re.search(rf"^ *{served} +{plan.epsilon_after(served, settings):.3f} *$", out, re.MULTILINE)
    assert "ε ≤ 4 at δ = 0.0001" in out
    assert not list(tmp_path.iterdir())


def test_plan_prints_the_bytes_of_each_kind_of_sites(lalora: Lalora, tmp_path: Path) -> None:
    code, out, _ = lalora("plan", "-c", pairs(strategy="hetlora", profiles="rank=1;", num_supernodes=3))
    weak, whole = make_plan(small(tmp_path, strategy="hetlora", profiles="rank=1;", num_supernodes=3)).traffic
    words = " ".join(out.split())
    assert code == 0 and weak.up[0] < whole.up[0]
    assert f"bytes a round {weak.down:,} down and {weak.up[0]:,} up, a site of profile rank=1 (2 of 3)" in words
    assert f"{whole.down:,} down and {whole.up[0]:,} up, a site without a profile (1 of 3)" in words


def test_plan_warns_of_a_delta_that_is_too_large(lalora: Lalora) -> None:
    assert "not below 1 / 550 records" in lalora("plan", "-c", pairs(privacy__delta=0.01, privacy__accountant="rdp"))[1]
    assert "below 1 /" not in lalora("plan", "-c", pairs(privacy__accountant="rdp"))[1]


def test_plan_without_privacy_says_so_and_promises_no_epsilon(lalora: Lalora) -> None:
    code, out, _ = lalora("plan", "-c", pairs(privacy__epsilon="inf"))
    assert code == 0 and "NON-PRIVATE" in out
    assert "predicted ε" not in out and "ε ≤" not in out


def test_keys_lists_every_key_with_its_meaning(lalora: Lalora) -> None:
    code, out, _ = lalora("keys")
    words = " ".join(out.split())
    assert code == 0
    for key in KEYS.values():
        assert re.search(rf"^ *{re.escape(key.name)} ", out, re.MULTILINE), key.name
        assert key.doc.split()[0] in words


def test_an_inline_run_succeeds_and_prints_what_it_wrote(lalora: Lalora, tmp_path: Path) -> None:
    code, out, err = lalora("run", "--engine", "inline", "-c", pairs(output_dir="out", run_name="mine"))
    assert (code, err) == (0, "")
    folder = tmp_path / "out" / "mine"
    summary = strict_json((folder / "summary.json").read_text())
    lines = [strict_json(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        shown = rf"^ *{line['round']}/2 +{line['accuracy']:.3f} +{line['loss']:.3f} +{line['epsilon']:.3f} +2 "
        assert re.search(shown, out, re.MULTILINE)
    assert f"-> {summary['accuracy']:.3f}; ε = {summary['epsilon']:.3f} at δ = 0.0001" in out
    assert "seeded" in out and "NON-PRIVATE" not in out
    assert f"results in {folder}" in out


def test_a_run_without_privacy_says_so_in_every_line(lalora: Lalora) -> None:
    code, out, _ = lalora("run", "--engine", "inline", "-c", pairs(output_dir="out", privacy__epsilon="inf"))
    assert code == 0 and out.count("non-private") == 2
    assert "NON-PRIVATE" in out.splitlines()[-2] and "ε =" not in out.splitlines()[-2]


def test_a_run_without_a_name_gets_one_from_its_settings(lalora: Lalora, tmp_path: Path) -> None:
    assert lalora("run", "--engine", "inline", "-c", pairs(output_dir="out", **NO_NOISE))[0] == 0
    (folder,) = (tmp_path / "out").iterdir()
    assert re.fullmatch(r"la-lora-epsinf-seed0-\d{8}-\d{6}", folder.name)
    assert f'run-name = "{folder.name}"' in (folder / "config.toml").read_text()


def test_a_second_run_of_the_same_name_is_one_line_and_touches_nothing(lalora: Lalora, tmp_path: Path) -> None:
    override = pairs(output_dir="out", run_name="mine", **NO_NOISE)
    assert lalora("run", "--engine", "inline", "-c", override)[0] == 0
    before = files_in(tmp_path)
    assert_one_line(lalora("run", "--engine", "inline", "-c", override), "run-name = 'mine'", "holds a run already")
    assert files_in(tmp_path) == before


@pytest.fixture
def at_sites(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[RecordDict, Context], RecordDict]], None]:
    """What the virtual sites of an inline run do instead of training; returns None to let them train."""

    def install(work: Callable[[RecordDict, Context], Any]) -> None:
        def behaviour(message: Message, context: Context, app: AppCall) -> Message:
            if message.metadata.message_type == "train":
                reply = answer(work, message, context, lambda: 0.0)
                if reply.has_error():
                    return reply
            return app(message, context)

        monkeypatch.setattr(inline, "simulated_app", lambda models: Spy(behaviour))

    return install


def test_a_run_that_fails_ends_with_one_line_and_code_1(lalora: Lalora, at_sites: Any, tmp_path: Path) -> None:
    def work(*_: Any) -> Any:
        raise SiteRefusal("model: differs")

    at_sites(work)
    outcome = lalora("run", "--engine", "inline", "-c", pairs(output_dir="out", run_name="mine", **NO_NOISE))
    assert_one_line(outcome, "round 1: 2 of 2 sites failed", "model: differs", code=1)
    assert not (tmp_path / "out" / "mine" / "summary.json").exists()


@pytest.mark.parametrize(
    ("reason", "said"),
    [("model: differs", "site 1 failed: model: differs"), ("budget: spent", "site 1 leaves the run: its budget is spent")],
)
def test_a_failing_site_is_named_on_the_console(reason: str, said: str, lalora: Lalora, at_sites: Any) -> None:
    def work(content: Any, context: Any) -> Any:
        if context.node_config["partition-id"] == 1:
            raise SiteRefusal(reason)
        return RecordDict()

    at_sites(work)
    code, out, _ = lalora("run", "--engine", "inline", "-c", pairs(output_dir="out", **NO_NOISE))
    assert code == 0 and said in out


def test_a_librarys_many_lines_become_one(lalora: Lalora, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise SiteRefusal("first\nsecond\n\n   third")

    monkeypatch.setattr(cli_run, "smallest_site", refuse)
    outcome = lalora("run", "-c", pairs(output_dir="out"))
    assert_one_line(outcome, code=1)
    assert outcome[2] == "lalora: first second third\n"


def test_an_interrupted_run_says_so_in_one_line_and_ends_with_130(lalora: Lalora, at_sites: Any, tmp_path: Path) -> None:
    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    at_sites(interrupt)
    outcome = lalora("run", "--engine", "inline", "-c", pairs(output_dir="out", run_name="mine", **NO_NOISE))
    assert_one_line(outcome, "interrupted", code=130)
    assert not (tmp_path / "out" / "mine" / "summary.json").exists()


def test_an_engine_that_wrote_no_summary_is_no_success(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(federation._Run, "finish", lambda self: None)
    with pytest.raises(BaseException) as left:
        cli.main(["run", "--engine", "inline", "-c", pairs(output_dir=tmp_path, **NO_NOISE)])
    assert not isinstance(left.value, SystemExit) or left.value.code
    assert list(tmp_path.rglob("checkpoint"))


@pytest.mark.slow
def test_the_installed_command_runs_inline(tmp_path: Path) -> None:
    override = pairs(output_dir="out", run_name="mine", **NO_NOISE)
    code, out, err = real_lalora(tmp_path, "run", "--engine", "inline", "-c", override)
    assert (code, err) == (0, "")
    assert "results in" in out and (tmp_path / "out" / "mine" / "summary.json").exists()
