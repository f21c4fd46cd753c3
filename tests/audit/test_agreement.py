"""A number that is forged in one file, with every digest as it has to be, contradicts another file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lalora_flwr.audit import membership_record, record
from lalora_flwr.audit.verify import verify
from lalora_flwr.ground.errors import RunFailed
from lalora_flwr.privacy.accounting import epsilon_spent
from lalora_flwr.privacy.events import SampledGaussian
from tests.audit.test_membership import RECORD, WEAK
from tests.audit.test_verify import content, forge
from tests.conftest import Finished


@pytest.fixture
def run(finished: Callable[..., Finished], tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(finished().path, tmp_path / "copy"))


def rewrite(run: Path, name: str, change: Callable[[str], str]) -> None:
    """Another file, with the certificate's digest of it as it has to be."""
    before = (run / name).read_text()
    (run / name).write_text(change(before))
    assert (run / name).read_text() != before
    digest = hashlib.sha256((run / name).read_bytes()).hexdigest()
    forge(run, lambda whole: whole["files"].update({name: digest}))


def summary(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    def changed(text: str) -> str:
        values = json.loads(text)
        change(values)
        return json.dumps(values)

    rewrite(run, "summary.json", changed)


WORDS = ["run", "date", "privacy_unit", "neighbouring_datasets", "trust_model", "observers", "mechanism"]
WORDS += ["clipping", "random_numbers", "records", "vouched_by"]


@pytest.mark.parametrize("name", WORDS)
def test_words_of_a_certificate_are_those_of_the_run(name: str, run: Path) -> None:
    forge(run, lambda whole: whole.update({name: "the operating system of each site"}))
    with pytest.raises(RunFailed, match=f"{name} is "):
        list(verify(run))


FORGERIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another C": (lambda whole: whole.update(clip_norm=0.125), "clip_norm"),
    "another format": (lambda whole: whole.update(format=True), "format"),
    "an ε for colluders": (lambda whole: whole.update(epsilon_if_all_others_collude=1.0), "epsilon_if_all_others_collude"),
    "another accountant": (lambda whole: whole["accountants_of"].update(pld="jax_privacy 2.0"), "accountants_of"),
    "another revision": (lambda whole: whole["base_model"].update(revision="main"), "base_model"),
    "another commit": (lambda whole: whole["code"].update(commit="0"), "commit"),
    "a site left out": (lambda whole: whole["sites"].pop("0"), "its sites are not"),
    "a site's noise not known": (
        lambda whole: [
            whole["sites"]["0"].update(steps=None, epsilon=1.0),
            whole["sites"]["0"].pop("epsilon_by_second_accountant"),
        ],
        "not known, and its epsilon is below the run's",
    ),
    "steps as a text": (lambda whole: whole["sites"]["0"]["steps"][0].__setitem__(2, "4"), "a number of steps is none"),
    "run ids as a text": (lambda whole: whole.update(run_ids="12"), "run_ids"),
    "a number without end": (lambda whole: whole["sites"]["0"]["steps"][0].__setitem__(0, 10**400), "not what a run writes"),
    "an ε without end": (lambda whole: whole["sites"]["0"].update(epsilon=10**400), "not what a run writes"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_certificate_alone_cannot_be_forged(name: str, run: Path) -> None:
    change, match = FORGERIES[name]
    with suppress(OverflowError):  # no PRIVACY.md can say that; the certificate is written before
        forge(run, change)
    with pytest.raises(RunFailed, match=match):
        list(verify(run))


def test_fewer_steps_in_certificate_and_summary_contradict_the_metrics(run: Path) -> None:
    sigma, q, steps = content(run)["sites"]["0"]["steps"][0]
    events = [SampledGaussian(sigma, q, steps // 2)]
    small = {which: epsilon_spent(events, content(run)["delta"], which) for which in ("pld", "rdp")}

    def fewer(whole: dict[str, Any]) -> None:
        whole["epsilon"] = small["pld"]
        for site in whole["sites"].values():
            site["epsilon"] = small["pld"]
            if isinstance(site["steps"], list):
                site.update(steps=[[sigma, q, steps // 2]], epsilon_by_second_accountant=small["rdp"])
            else:
                site["steps"] = steps // 2

    forge(run, fewer)
    with pytest.raises(RunFailed, match=r"privacy\.json: epsilon"):
        list(verify(run))
    summary(run, fewer)
    with pytest.raises(RunFailed, match=r"metrics\.jsonl: epsilon is"):
        list(verify(run))


@pytest.mark.parametrize(
    "name", ["private", "seeded", "strategy", "data", "clip_norm", "accountant", "rounds", "noise_multiplier"]
)
def test_a_summary_alone_cannot_be_forged(name: str, run: Path) -> None:
    other: dict[str, object] = {"private": False, "seeded": False, "clip_norm": 0.1, "rounds": 99, "noise_multiplier": 9.0}
    summary(run, lambda values: values.update({name: other.get(name, "rdp")}))
    with pytest.raises(RunFailed):
        list(verify(run))


def test_a_model_card_says_what_the_summary_says(run: Path) -> None:
    card = (run / "adapter" / "README.md").read_text()
    for before, after in (
        (r"\(ε, δ\) = \([\d.]+", "(ε, δ) = (0.1"),
        (r"\| accuracy \| [\d.]+", "| accuracy | 0.99"),
        (r"\| 0 \| 0 ", "| 0 | 1 "),
    ):
        rewrite(run, "adapter/README.md", lambda text, old=before, new=after: re.sub(old, new, text))
        with pytest.raises(RunFailed, match=r"README\.md: its section (Privacy|Results|Classes) does not say"):
            list(verify(run))
        rewrite(run, "adapter/README.md", lambda text: card)
    list(verify(run))


def test_an_attack_of_another_run_is_none_of_this_one(run: Path) -> None:
    good = dataclasses.replace(RECORD, epsilon=4.0)
    record.write(good, run / membership_record.FILE)
    assert any(line.startswith("attacked") for line in verify(run))
    for bad, match in (
        (dataclasses.replace(good, epsilon=8.0), "another claim"),
        (dataclasses.replace(good, strategy="dp-lora"), "another claim"),
        (dataclasses.replace(good, attacks=[dataclasses.replace(WEAK, epsilon_one_run=9.0)]), "is false"),
    ):
        record.write(bad, run / membership_record.FILE)
        with pytest.raises(RunFailed, match=match):
            list(verify(run))


def test_a_file_that_is_a_pipe_or_without_end_is_one_line(run: Path) -> None:
    for name in ("audit.json", "membership.json", "PRIVACY.md", "privacy.json"):
        before = (run / name).read_bytes() if (run / name).exists() else None
        (run / name).unlink(missing_ok=True)
        with (run / name).open("wb") as file:
            file.truncate(2**40)  # sparse
        with pytest.raises(RunFailed, match="more than 64 MiB"):
            list(verify(run))
        (run / name).unlink()
        if name != "privacy.json":
            os.mkfifo(run / name)
            with pytest.raises(RunFailed, match=r"no plain file|does not say"):
                list(verify(run))
            (run / name).unlink()
        if before is not None:
            (run / name).write_bytes(before)
    for name in ("audit.json", "membership.json"):
        (run / name).write_text("[" * 100_000)
        with pytest.raises(RunFailed, match=name):
            list(verify(run))
        (run / name).unlink()
    list(verify(run))


def test_a_link_to_a_folder_was_added(run: Path) -> None:
    (run / "adapter" / "more").symlink_to(run / "plots", target_is_directory=True)
    with pytest.raises(RunFailed, match="was added"):
        list(verify(run))
