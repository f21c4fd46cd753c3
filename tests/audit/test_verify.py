"""``lalora verify``: one changed byte anywhere is noticed, and every number is computed anew."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lalora_flwr.audit.record import FILE, write
from lalora_flwr.audit.verify import verify
from lalora_flwr.ground.errors import ConfigError, RunFailed
from lalora_flwr.ledger.file import LedgerFile
from lalora_flwr.ledger.site_ledger import SiteLedger
from lalora_flwr.privacy.accounting import epsilon_spent
from lalora_flwr.server.certificate import CERTIFICATE, READABLE, code_digest, readable, sealed
from tests.audit.test_audit import RECORD
from tests.cli.commands import Lalora
from tests.cli.commands import lalora as lalora
from tests.conftest import Finished
from tests.ledger.site_ledgers import DELTA, new_ledger, request

Make = Callable[..., Finished]


@pytest.fixture
def run(finished: Make, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(finished().path, tmp_path / "copy"))


def content(folder: Path) -> dict[str, Any]:
    whole: dict[str, Any] = json.loads((folder / CERTIFICATE).read_text())
    return whole


def forge(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Another certificate, with every digest as it has to be."""
    whole = content(folder)
    del whole["digest"]
    change(whole)
    text = sealed({name: value for name, value in whole.items() if name != "files"}, whole["files"])
    (folder / CERTIFICATE).write_text(text)
    (folder / READABLE).write_text(readable(json.loads(text)))


def test_a_finished_run_is_good(run: Path, lalora: Lalora) -> None:
    whole = content(run)
    assert whole["epsilon"] <= 4.0 and len(whole["sites"]) == 3 and whole["sites"]["0"]["steps"][0][2] == 4
    assert {"adapter/adapter_model.safetensors", "checkpoint/adapter.safetensors"} <= set(whole["files"])
    assert {"summary.json", "config.toml", "metrics.jsonl", "adapter/README.md"} <= set(whole["files"])
    code, out, err = lalora("verify", str(run))
    assert "the code that ran is the one that is installed here" in out
    assert whole["accountants_of"]["pld"].startswith("lalora-flwr ") and whole["accountants_of"]["rdp"].startswith("opacus ")
    assert whole["utility"]["metric"] == "accuracy" and "utility on public records" in (run / READABLE).read_text()
    forge(run, lambda whole: whole["code"].update(digest="0"))
    assert any("another code ran" in line for line in verify(run))
    assert (code, err) == (0, "") and "by pld, and rdp does not contradict it" in out and out.endswith("good\n")


@pytest.mark.parametrize("kind", ["secure sum", "ridge head", "not private", "clipped apart"])
def test_other_runs_are_good(kind: str, finished: Make) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "secure sum": {"strategy": "steady-lora", "trust": "secure-sum", "train__local_steps": 1},
        "ridge head": {"lora__head": "ridge"},
        "not private": {"privacy__epsilon": float("inf")},
        "clipped apart": {"strategy": "dp-lora", "privacy__clipping": "apart", "filter__name": "slow-a"},
    }
    folder = finished(**kinds[kind]).path
    lines = list(verify(folder))
    whole = content(folder)
    assert ("jointly" in whole["mechanism"]) == (kind != "clipped apart") == ("lora_A" not in (folder / READABLE).read_text())
    if kind == "not private":
        assert any("not differentially private" in line for line in lines) and whole["epsilon"] is None
        assert "not differentially private" in (folder / READABLE).read_text()
    elif kind == "secure sum":
        assert (
            whole["epsilon_if_all_others_collude"] > whole["epsilon"] and "If all other sites" in (folder / READABLE).read_text()
        )
    elif kind == "ridge head":
        assert [step[1] for step in whole["sites"]["0"]["steps"]] == [1.0, whole["sites"]["0"]["steps"][1][1]]


def test_one_changed_byte_anywhere_is_noticed(run: Path) -> None:
    names = [*content(run)["files"], CERTIFICATE, READABLE]
    for name in names:
        before = (run / name).read_bytes()
        for place in {0, len(before) // 2, len(before) - 1}:
            (run / name).write_bytes(before[:place] + bytes([before[place] ^ 1]) + before[place + 1 :])
            with pytest.raises(RunFailed):
                list(verify(run))
        (run / name).write_bytes(before)
    list(verify(run))
    (run / "adapter" / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(RunFailed, match="was added"):
        list(verify(run))
    (run / "adapter" / "adapter_model.bin").unlink()
    (run / names[0]).unlink()
    with pytest.raises(RunFailed, match="is gone"):
        list(verify(run))


FORGERIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a smaller ε": (lambda whole: whole.update(epsilon=1.0), "epsilon"),
    "a site's smaller ε": (lambda whole: whole["sites"]["1"].update(epsilon=1.0), "site 1"),
    "more noise": (lambda whole: whole["sites"]["1"]["steps"][0].__setitem__(0, 99.0), "site 1"),
    "fewer steps": (lambda whole: whole["sites"]["1"]["steps"][0].__setitem__(2, 1), "site 1"),
    "another second ε": (lambda whole: whole["sites"]["1"].update(epsilon_by_second_accountant=4.5), "second accountant"),
    "another δ": (lambda whole: whole.update(delta=0.1), "delta is 0.1"),
    "a private run said not to be": (lambda whole: whole.update(differentially_private=False), "differentially_private is False"),
    "a file left out": (lambda whole: whole["files"].pop("summary.json"), "not about summary.json"),
    "the adapter left out": (
        lambda whole: [whole["files"].pop(name) for name in list(whole["files"]) if name.startswith("adapter/")],
        "not about adapter/",
    ),
    "more utility": (lambda whole: whole["utility"].update(after=0.99), "utility"),
    "a leak left out": (lambda whole: whole.update(not_covered=["nothing"]), "not_covered is"),
    "another base model": (lambda whole: whole["base_model"].update(digest="0"), "base_model is"),
    "a file elsewhere": (lambda whole: whole["files"].update({"../x": "0"}), "outside"),
    "no sites": (lambda whole: whole.update(sites={}), "its sites are not those"),
    "nonsense": (lambda whole: whole.update(sites=[1]), "not what a run writes"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_numbers_that_do_not_fit_are_noticed_though_every_digest_does(name: str, run: Path) -> None:
    change, match = FORGERIES[name]
    try:
        forge(run, change)
    except (KeyError, TypeError, AttributeError):  # no PRIVACY.md can say that
        whole = content(run)
        del whole["digest"]
        change(whole)
        (run / CERTIFICATE).write_text(sealed({n: v for n, v in whole.items() if n != "files"}, whole["files"]))
    with pytest.raises(RunFailed, match=match):
        list(verify(run))


def test_an_audit_may_come_later_and_counts(run: Path) -> None:
    good = dataclasses.replace(RECORD, epsilon=4.0, delta=1e-4, sites=3, gaussian_pair=2.0)
    write(good, run / FILE)
    assert any(line.startswith("audited: the claim of ε = 4") for line in verify(run))
    for bad, match in (
        (dataclasses.replace(good, survived=False, clopper_pearson=9.0), "is false"),
        (dataclasses.replace(good, epsilon=8.0), "another claim"),
        (dataclasses.replace(good, strategy="dp-lora"), "another claim"),
        (dataclasses.replace(good, trust="secure-sum"), "another claim"),
        (dataclasses.replace(good, sites=9), "another run"),
        (dataclasses.replace(good, clopper_pearson=9.0), "is not what its numbers say"),
        (dataclasses.replace(good, contracts={"a": "broken"}), "is not what its numbers say"),
    ):
        write(bad, run / FILE)
        with pytest.raises(RunFailed, match=match):
            list(verify(run))


def session(path: Path) -> SiteLedger:
    """Of the run "1", with the real accountant."""
    ledger = SiteLedger(LedgerFile(path), request(), 1e6, DELTA, epsilon_spent)
    ledger.identify("records")
    return ledger


def test_a_sites_ledger_has_to_know_the_run(run: Path, tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    with pytest.raises(RunFailed, match="was a simulation"):
        list(verify(run, [path]))
    sigma, q, steps = content(run)["sites"]["0"]["steps"][0]
    forge(run, lambda whole: whole.update(run_ids=["0", "1"]))
    with pytest.raises(RunFailed, match="holds nothing of this run"):
        list(verify(run, [path]))
    session(path).reserve(sigma, q, steps)
    assert f"{steps} steps at σ = {sigma:.4g}" in list(verify(run, [path]))[-1]
    session(path).reserve(1.1 * sigma, q, steps)  # as many again, with more noise
    with pytest.raises(RunFailed, match="no site of the certificate covers"):
        list(verify(run, [path]))


def test_a_folder_without_a_certificate_is_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no privacy\.json"):
        list(verify(tmp_path))


def test_a_ledger_that_is_not_there_is_wrong_input_and_no_difference(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gone: no such file"):
        next(verify(run, [tmp_path / "gone"]))


def test_the_code_is_known_by_every_file(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    one = code_digest(tmp_path)
    (tmp_path / "b.py").write_text("")
    two = code_digest(tmp_path)
    (tmp_path / "b.py").rename(tmp_path / "c.py")
    assert len({one, two, code_digest(tmp_path)}) == 3 and len(code_digest()) == 64
