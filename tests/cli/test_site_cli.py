"""``lalora site check``: what a site would refuse, leave out or do badly is said before it joins."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from flwr.common.config import parse_config_args
from pyarrow import parquet
from typer.testing import CliRunner

from lalora_flwr.cli.certs import superlink_files, supernode_keys
from lalora_flwr.cli.main import app
from lalora_flwr.cli.site import Finding, check_node_config, parse_node_config
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ledger.file import LedgerFile
from tests.data.files import write, write_csv, write_images
from tests.ledger.site_ledgers import new_ledger, serve
from tests.models.folders import save_hf, save_timm

ROWS = [("the film is good", "good"), ("the film is bad", "bad")] * 10


def written(config: dict[str, Any]) -> str:
    return " ".join(f"{key}={json.dumps(value)}" for key, value in config.items() if value is not None)


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """A good site with twenty texts."""
    data = write_csv(tmp_path / "own.csv", ROWS)
    limits = {"max-epsilon": 3.0, "delta": 1e-5, "num-records": 20}
    return {
        "task": "text",
        "labels": "good,bad",
        "ledger-path": str(new_ledger(tmp_path)),
        "data-path": str(data),
        "allow-run-model": True,
        **limits,
    }


def found(config: dict[str, Any], **options: Path) -> dict[str, Finding]:
    return {finding.subject: finding for finding in check_node_config(written(config), **options)}


def test_a_good_site_is_told_what_it_has_and_counts_nothing(config: dict[str, Any], tmp_path: Path) -> None:
    save_hf(tmp_path / "model", "bert", "base")
    before = Path(config["ledger-path"]).read_bytes()
    config |= {"model-path": str(tmp_path / "model"), "max-tokens": 16, "witness-path": str(tmp_path / "witness")}
    LedgerFile(config["ledger-path"], witness=config["witness-path"]).make_witness()
    findings = found(config)
    assert {finding.state for finding in findings.values()} == {"ok"}, findings
    assert findings["records"].detail == "20 of 20 can be used" and findings["classes"].detail == "good 10, bad 10"
    assert "epsilon 0 spent, 3 left" in findings["ledger"].detail
    assert Path(config["ledger-path"]).read_bytes() == before


@pytest.mark.parametrize(
    ("precision", "off"),
    [("float32", r"0\.0%;"), ("bfloat16", r"(0\.[1-9]|[1-9]\.\d)%;"), ("nf4", r"\d\.\d% \(that of its four bits\);")],
)
def test_a_check_says_how_far_a_gradient_in_the_sites_precision_is_off(
    precision: str, off: str, config: dict[str, Any], tmp_path: Path
) -> None:
    save_hf(tmp_path / "model", "bert", "base", hidden_size=64)
    config |= {"model-path": str(tmp_path / "model"), "max-tokens": 16, "profile": f"precision={precision}"}
    model = found(config)["model"]
    assert model.state == "ok" and re.search(f"in its precision it is off by {off}", model.detail), model


def test_several_classes_and_numbers_are_checked_as_the_owner_declares_them(config: dict[str, Any], tmp_path: Path) -> None:
    rows = [("the film is good", "good|long"), ("the film is bad", "bad"), ("a plot", "[]"), ("an actor", "cough")] * 5
    several = {"data-path": str(write_csv(tmp_path / "several.csv", rows)), "labels": "good,bad,long"}
    findings = found({**config, **several, "problem-type": "multi-label"})
    assert findings["classes"].detail == "good 5, bad 5, long 5" and findings["records"].detail == "15 of 20 can be used"
    assert "cough' 5" in findings["labels"].detail
    numbers = {"data-path": str(write_csv(tmp_path / "numbers.csv", [("a", "3.5"), ("b", "11")] * 10)), "labels": None}
    findings = found({**config, **numbers, "problem-type": "regression", "label-range": "0,10"})
    assert findings["left out"].detail == "10: its number is none, or beyond the range" and "classes" not in findings
    for wrong in ({"problem-type": "regression"}, {"label-range": "0,1"}, {"problem-type": "regression", "label-range": "1,0"}):
        assert found({**config, **wrong})["keys"].state == "fault"


def test_what_it_prints_and_how_it_exits(config: dict[str, Any]) -> None:
    run = CliRunner().invoke(app, ["site", "check", written(config)])
    assert run.exit_code == 0
    assert "ok      keys: 8 are known and can be used\n" in run.output and "warning model: no model-path" in run.output
    run = CliRunner().invoke(app, ["site", "check", written({**config, "ledger-path": "/nowhere/ledger"})])
    assert run.exit_code == 1 and "fault   ledger: " in run.output


def test_records_left_out_are_counted_by_reason(config: dict[str, Any], tmp_path: Path) -> None:
    rows = [*ROWS, ("x", "other"), ("", "good"), ("a", "b", "c")]
    config["data-path"] = str(write_csv(tmp_path / "own.csv", rows))
    left = [f.detail for f in check_node_config(written(config)) if f.subject == "left out"]
    assert sorted(left) == ["1: it has more fields than there are columns", "1: its label is unknown", "1: its text is missing"]
    findings = found(config)
    assert findings["records"].detail == "20 of 23 can be used"
    assert findings["labels"].detail == "1 not among good, bad: 'other' 1"
    assert findings["columns"].detail == "text 'text', label 'label'"


def test_one_column_cannot_be_the_text_and_its_label(config: dict[str, Any]) -> None:
    finding = found({**config, "text-column": "label", "label-column": "label"})["columns"]
    assert finding.fault and "text 'label', label 'label'; one column cannot be two things" in finding.detail


def test_a_tokenizer_beyond_its_model_is_a_fault_of_the_model(config: dict[str, Any], tmp_path: Path) -> None:
    save_hf(tmp_path / "model", "bert", "base")
    file = tmp_path / "model" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["zebra"] = len(content["model"]["vocab"])
    file.write_text(json.dumps(content))
    config |= {
        "data-path": str(write_csv(tmp_path / "own.csv", [*ROWS, ("a zebra", "good")])),
        "model-path": str(tmp_path / "model"),
    }
    findings = found(config)
    assert findings["model"].fault and "its tokenizer knows 'zebra' as token" in findings["model"].detail


def tsv(folder: Path) -> Path:
    return write(folder / "t.tsv", "text\tlabel\n" + "".join("\t".join(row) + "\n" for row in ROWS))


def parquet_file(folder: Path) -> Path:
    texts, labels = zip(*ROWS, strict=True)
    parquet.write_table(pa.table({"text": list(texts), "label": list(labels)}), folder / "t.parquet")
    return folder / "t.parquet"


@pytest.mark.parametrize("make", [tsv, parquet_file])
def test_other_kinds_of_files(config: dict[str, Any], tmp_path: Path, make: Callable[[Path], Path]) -> None:
    assert found({**config, "data-path": str(make(tmp_path))})["records"].detail == "20 of 20 can be used"


@pytest.mark.parametrize("with_model", [False, True])
def test_a_folder_of_images(config: dict[str, Any], tmp_path: Path, with_model: bool) -> None:
    images = write_images(tmp_path / "images", ["good/0.png", "good/1.png", "other/2.png", "bad/3.png"])
    (images / "bad" / "3.png").write_bytes(b"garbled")
    config |= {"task": "image", "data-path": str(images)}
    if with_model:
        save_timm(tmp_path / "vit", "vit")
        config["model-path"] = str(tmp_path / "vit")
    findings = [f.text for f in check_node_config(written(config)) if f.subject in ("records", "left out", "classes")]
    assert findings == [
        "records: 2 of 4 can be used",
        "left out: 1: its label is unknown",
        "left out: 1: the image cannot be read",
        "classes: good 2, bad 0; a class has no record",  # the only one of bad is the image that cannot be read
    ]


@pytest.mark.parametrize(
    ("changed", "subject", "state", "says"),
    [
        ({"max-epsilom": 1}, "keys", "fault", "a key is unknown; .*max-epsilom"),
        ({"num-records": None}, "keys", "fault", "num-records is missing"),
        ({"labels": None}, "keys", "fault", "labels are missing"),
        ({"max-epsilon": 20.0}, "budget", "warning", "a weak promise"),
        ({"ledger-path": "/nowhere/x"}, "ledger", "fault", "."),
        ({"data-path": "/nowhere/x.csv"}, "records", "fault", "no such file or folder"),
        ({"data-path": None}, "records", "fault", "no data-path"),
        ({"label-column": "kind"}, "records", "fault", "label-column = 'kind': no such column"),
        ({"labels": "yes,no"}, "records", "fault", "0 of 20 can be used"),
        ({"labels": "good,bad,fair"}, "classes", "warning", "fair 0; a class has no record"),
        ({"num-records": 300}, "num-records", "warning", "300 declared, but there are 20"),
        *(
            ({"model-path": place}, "model", "fault", f"^model-path = '{place}': no folder with a config.json$")
            for place in ("/nowhere/model", "prajjwal1/bert-tiny", "bert-base-uncased", "tests/cli")
        ),
        ({"answer-seconds": 0}, "answer-seconds", "warning", "how long"),
        ({"profile": "rank=2 layers=4"}, "profile", "ok", "2 components .* training the last 4 layers$"),
        ({"profile": "steps=3 batch=1 precision=bfloat16"}, "profile", "ok", "3 local steps a round, .* 1 records .*bfloat16"),
        ({"profile": "batch=4"}, "profile", "warning", "no effect above records-at-once = 1"),
        ({"profile": "precision=int8"}, "profile", "warning", "no run will be served"),
        ({"profile": "rank=two"}, "profile", "warning", "whole numbers from 1, .* for hetlora"),
        ({"metrics-path": "/nowhere/site.prom"}, "metrics-path", "warning", "its folder is not there"),
        ({"metrics-path": "site.txt"}, "metrics-path", "warning", "names that end in .prom"),
        ({"metrics-path": "site.prom"}, "metrics-path", "ok", "site.prom"),
        ({"alert-epsilon": 3.0}, "keys", "fault", "alert-epsilon must be below max-epsilon"),
        ({"allow-evaluation": True, "evaluation-noise": 100.0}, "evaluation", "ok", "the first answer spends epsilon 0.0"),
        ({"allow-evaluation": True, "evaluation-noise": 1.0}, "evaluation", "warning", "spends epsilon [1-9]"),
    ],
    ids=str,
)
def test_each_fault_has_its_line(changed: dict[str, Any], subject: str, state: str, says: str, config: dict[str, Any]) -> None:
    finding = found({**config, **changed})[subject]
    assert finding.state == state and re.search(says, finding.detail), finding


def test_an_alert_that_was_reached_is_a_warning(config: dict[str, Any]) -> None:
    assert "alert-epsilon" not in found(config | {"alert-epsilon": 0.1})
    serve(Path(config["ledger-path"]), sigma=1.0, q=0.5, steps=3)
    assert found(config | {"alert-epsilon": 0.1})["alert-epsilon"] == Finding(
        "warning", "alert-epsilon", "epsilon has reached 0.1"
    )


def test_keys_and_certificates(config: dict[str, Any], tmp_path: Path) -> None:
    superlink_files(tmp_path / "certificates", ["localhost"], 3)
    supernode_keys(tmp_path / "keys", ["north"])
    key, ca = tmp_path / "keys" / "north", tmp_path / "certificates" / "ca.crt"
    findings = found(config, superlink_key=key, root_certificates=ca)
    assert findings["superlink-key"].state == findings["root-certificates"].state == "ok"
    key.chmod(0o644)
    assert found(config, superlink_key=key)["superlink-key"].state == "warning"
    for wrong in (key.with_suffix(".pub"), tmp_path / "gone"):
        findings = found(config, superlink_key=wrong, root_certificates=wrong)
        assert findings["superlink-key"].fault and findings["root-certificates"].fault


def test_records_known_under_another_name_are_a_fault(config: dict[str, Any]) -> None:
    from lalora_flwr.ledger.fingerprint import fingerprint_of_files
    from tests.ledger.site_ledgers import session

    ledger = session(Path(config["ledger-path"]), fingerprint=fingerprint_of_files(config["data-path"]), dataset="ward")
    ledger.reserve(1.0, 0.1, 1)
    assert "in the ledger as 'ward'" in found(config)["dataset"].detail


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("max-epsilon", "Flower would pass over 'max-epsilon'"),
        ("max-epsilon= 3", "Flower would pass over"),
        ("a=1 and b=2", "Flower would pass over 'and'"),
        ("max-epsilon=three", "cannot be parsed"),
        ('a="b', "cannot be parsed"),
        ("/nowhere/x.toml", "cannot be read"),
    ],
)
def test_a_text_that_flower_would_not_read_as_meant_is_exit_code_2(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        parse_node_config(text)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("text", ['a="b c" d=1 e=true f=0.5', "a='b = c'", 'a.b=1 c="x=y"'])
def test_a_good_text_is_what_flower_reads(text: str) -> None:
    assert parse_node_config(text) == parse_config_args([text]) != {}


def test_a_csv_with_texts_of_several_lines_is_a_fault(config: dict[str, Any], tmp_path: Path) -> None:
    """Their lines would be rows of their own: several records for one person."""
    (tmp_path / "own.csv").write_text('text,label\n"Dear doctor,\nI am well,good\nBye",good\nfine,good\nill,bad\n')
    config["data-path"] = str(tmp_path / "own.csv")
    fault = next(f for f in check_node_config(written(config)) if f.subject == "left out")
    assert fault.fault and fault.detail.startswith("2: the quotes in its line do not match")
    assert fault.detail.endswith("a row is one line: write texts with line breaks as JSON lines or Parquet")


def test_an_audit_is_one_more_line_of_the_check(config: dict[str, Any], tmp_path: Path) -> None:
    """At the site's own ε and number of records; its ledger counts nothing."""
    save_hf(tmp_path / "model", "bert", "base")
    config |= {"model-path": str(tmp_path / "model"), "max-tokens": 16, "num-records": 400}
    before = Path(config["ledger-path"]).read_bytes()
    done = CliRunner().invoke(app, ["site", "check", written(config), "--audit"])
    line = next(line for line in done.stdout.splitlines() if "audit:" in line)
    assert line.startswith("ok") and "the claim of ε = 3 at δ = 1e-05 survived" in line, done.stdout
    assert Path(config["ledger-path"]).read_bytes() == before


def test_a_site_whose_keys_are_wrong_is_not_audited(config: dict[str, Any]) -> None:
    done = CliRunner().invoke(app, ["site", "check", written({**config, "max-epsilon": -1.0}), "--audit"])
    assert done.exit_code == 1 and "audit:" not in done.stdout
