"""The commands of owners whose sites share one noise: keys, the check of a site, what a plan and a ledger show."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lalora_flwr.cli.main import app, main
from lalora_flwr.cli.site_checks import _sharing
from lalora_flwr.ledger.caps import Caps
from lalora_flwr.wire.sharing import public_bytes, read_key, read_roster
from tests.ledger.site_ledgers import new_ledger, serve
from tests.ledger.test_shared import shared_round


def make(folder: Path, name: str) -> str:
    """A key by the command; its line for rosters."""
    made = CliRunner().invoke(app, ["site", "keys", name, "--out", str(folder)])
    assert made.exit_code == 0, made.output
    (line,) = made.stdout.splitlines()
    return line


def test_a_key_is_for_its_owner_alone_and_its_line_for_everybodys_roster(tmp_path: Path) -> None:
    lines = [make(tmp_path / "keys", name) for name in ("north", "south-2.b")]
    roster = read_roster("\n".join(lines))
    for name, line in zip(("north", "south-2.b"), lines, strict=True):
        file = tmp_path / "keys" / f"{name}.sharing.key"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        (member,) = roster.only([name]).members
        assert member.key == public_bytes(read_key(file.read_bytes())) and line.split()[1] not in file.read_text()


@pytest.mark.parametrize("name", ["", "-x", "a b", "n" * 65, "../x", "ä"])
def test_a_name_that_no_roster_holds_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["site", "keys", "--out", str(tmp_path), "--", name])
    assert caught.value.code == 2 and capsys.readouterr().err.startswith("lalora: ") and not list(tmp_path.iterdir())


def test_a_key_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, "north")
    before = (tmp_path / "north.sharing.key").read_bytes()
    with pytest.raises(SystemExit) as caught:
        main(["site", "keys", "north", "--out", str(tmp_path)])
    assert caught.value.code == 2 and "is never overwritten" in capsys.readouterr().err
    assert (tmp_path / "north.sharing.key").read_bytes() == before


def found(folder: Path, roster: str, **changed: object) -> list[tuple[str, str]]:
    (folder / "roster").write_text(roster)
    keys = {"sharing_key": str(folder / "north.sharing.key"), "sharing_roster": str(folder / "roster"), "witness_path": "w"}
    caps = Caps("l", 3.0, 1e-5, 100, "image", ("a", "b"), **{**keys, **changed})  # type: ignore[arg-type]
    return [(finding.state, finding.text) for finding in _sharing(caps)]


def test_a_site_check_says_who_sums_and_finds_what_is_wrong(tmp_path: Path) -> None:
    lines = [make(tmp_path, name) for name in ("north", "south", "east")]
    ((state, text),) = found(tmp_path, "\n".join(lines))
    assert state == "ok" and text.startswith(
        "sharing: north of 3 sites (east, north, south), at least 3 in a sum, 1 may collude; roster "
    )
    assert found(tmp_path, "\n".join(lines[:2]))[0][0] == "fault"
    assert found(tmp_path, "\n".join(lines), sharing_colluders=3)[0][0] == "fault"
    assert "the site's own key file is not in it" in found(tmp_path, "\n".join(lines[1:]))[0][1]
    assert "line 4 is not a name" in found(tmp_path, "\n".join([*lines, "west"]))[0][1]
    assert "cannot be read" in found(tmp_path, "\n".join(lines), sharing_key=str(tmp_path / "none"))[0][1]
    assert [state for state, _ in found(tmp_path, "\n".join(lines), witness_path="")] == ["ok", "warning"]
    (tmp_path / "north.sharing.key").chmod(0o644)
    assert ("warning", "sharing-key") in [(state, text.split(":")[0]) for state, text in found(tmp_path, "\n".join(lines))]


def test_a_plan_shows_the_share_the_repeats_and_the_collusion_curve() -> None:
    shown = CliRunner().invoke(app, ["plan", "-c", "trust=secure-sum train.local-steps=1 num-rounds=40"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    text = " ".join(shown.stdout.split())
    assert "each of 4 sites adds" in text and "ε holds if at most 1 of them side with the server" in text
    assert "2 rounds may be asked for again" in text and "3 (all)" in text and "warning" not in text


def test_a_ledger_shows_the_worst_case_only_where_noise_was_shared(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    serve(path, 3.0)
    assert "collude" not in CliRunner().invoke(app, ["ledger", "show", str(path)]).stdout
    shared_round(path)
    shown = CliRunner().invoke(app, ["ledger", "show", str(path)])
    assert shown.exit_code == 0 and "if all other sites collude" in shown.stdout
