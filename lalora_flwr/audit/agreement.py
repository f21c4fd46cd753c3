"""What the files of a run say of one another: certificate, configuration, summary, metrics, model cards, attacks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lalora_flwr.audit.membership_record import FILE as ATTACKED
from lalora_flwr.audit.membership_record import MembershipRecord
from lalora_flwr.audit.record import FILE as AUDITED
from lalora_flwr.audit.record import AuditRecord
from lalora_flwr.ground.errors import LaloraError, RunFailed
from lalora_flwr.ledger.verify import SAME
from lalora_flwr.server.card import sections
from lalora_flwr.server.certificate import CERTIFICATE, claims
from lalora_flwr.server.metrics import CONFIG, METRICS, SUMMARY, RoundMetrics, SiteReport, Summary
from lalora_flwr.settings import Settings, read_toml, settings_kept

LATER = ("utility", "accountants_of")  # names that older versions did not write


@dataclass(frozen=True)
class Files:
    """What a run's folder holds beside its certificate."""

    folder: Path
    settings: Settings
    summary: Summary
    last: RoundMetrics

    @staticmethod
    def of(folder: Path) -> Files:
        """
        Raises:
            RunFailed: one of them cannot be read.
        """
        try:
            settings = settings_kept(read_toml(folder / CONFIG))
        except LaloraError as fault:
            raise RunFailed(f"{folder / CONFIG}: is not what a run writes ({fault})") from None
        try:
            summary = Summary.from_json(json.loads((folder / SUMMARY).read_bytes()))
            lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
            return Files(folder, settings, summary, RoundMetrics.from_json(json.loads(lines[-1])))
        except (ValueError, IndexError, RecursionError) as fault:
            raise RunFailed(f"{folder}: {SUMMARY} or {METRICS} is not what a run writes ({fault})") from None

    def check(self, whole: Mapping[str, Any]) -> None:
        """
        Raises:
            RunFailed: naming the first thing of which two files say something different.
        """
        self._claims(whole)
        self._summary()
        self._sites(whole)
        self._cards()

    def _claims(self, whole: Mapping[str, Any]) -> None:
        for name, wanted in claims(self.settings, self.summary).items():
            if (name in whole or name not in LATER) and not _alike(whole[name], wanted):
                self._refuse(f"{name} is {_short(whole[name])}, but {CONFIG} and {SUMMARY} make it {_short(wanted)}")
        if not isinstance(whole["run_ids"], list) or not all(isinstance(name, str) for name in whole["run_ids"]):
            self._refuse("run_ids is no list of texts")
        if not _alike(whole["code"]["commit"], self.summary.commit):
            self._refuse(f"code.commit is {_short(whole['code']['commit'])}, but not in {SUMMARY}")

    def _summary(self) -> None:
        """Summary against configuration and the last line of the metrics."""
        settings, summary, last = self.settings, self.summary, self.last
        shared = (settings.trust, settings.colluders) if settings.shares_noise else ("", None)
        asked: dict[str, tuple[object, object]] = {
            "strategy": (summary.strategy, settings.strategy),
            "model": (summary.model, settings.model.name),
            "data": (summary.data, settings.data.name),
            "seed": (summary.seed, settings.seed),
            "private": (summary.private, settings.private),
            "delta": (summary.delta, settings.privacy.delta),
            "clip_norm": (summary.clip_norm, settings.privacy.clip_norm),
            "accountant": (summary.accountant, settings.privacy.accountant),
            "trust and colluders": ((summary.trust, summary.colluders), shared),
        }
        for name, (said, wanted) in asked.items():
            if said != wanted:
                raise RunFailed(f"{self.folder / SUMMARY}: {name} is {_short(said)}, but {_short(wanted)} in {CONFIG}")
        ends: dict[str, tuple[object, object]] = {
            "rounds": (summary.rounds, last.round),
            "seeded": (summary.seeded, last.seeded),
            "private": (summary.private, last.private),
            "what it says of quality": (dict(summary.quality), dict(last.quality)),
        }
        for name, (said, wanted) in ends.items():
            if said != wanted:
                raise RunFailed(
                    f"{self.folder / SUMMARY}: {name} is {_short(said)}, but {_short(wanted)} at the end of {METRICS}"
                )
        # A round that was asked for and lost counts after the last line, so that the summary may say more.
        if summary.epsilon < last.epsilon or (summary.epsilon_alone or 0.0) < (last.epsilon_alone or 0.0):
            raise RunFailed(
                f"{self.folder / METRICS}: epsilon is {last.epsilon!r} at its end, but {summary.epsilon!r} in {SUMMARY}"
            )

    def _sites(self, whole: Mapping[str, Any]) -> None:
        if set(whole["sites"]) != set(self.summary.sites):
            self._refuse(f"its sites are not those of {SUMMARY}")
        noise = (self.summary.noise_multiplier, self.summary.sample_rate)
        if noise not in [(report.noise_multiplier, report.sample_rate) for report in self.summary.sites.values()]:
            raise RunFailed(f"{self.folder / SUMMARY}: its noise and sample rate are those of none of its sites")
        for site, report in self.summary.sites.items():
            if fault := self._site(whole["sites"][site], report):
                self._refuse(f"site {site}: {fault}")

    def _site(self, own: Mapping[str, Any], report: SiteReport) -> str:
        """What is wrong with a site of the certificate; empty: nothing."""
        private, shared = self.settings.private, self.settings.shares_noise
        for name, there in (("epsilon", private), ("steps_alone", shared), ("epsilon_if_all_others_collude", shared)):
            if (name in own) is not there:
                return f"{name} is {'missing' if there else 'there'}"
        if report.seeded != self.summary.seeded:
            return f"seeded is {report.seeded}, but not in {SUMMARY}"
        if own["steps"] is None:
            if not private or own["epsilon"] < self.settings.privacy.epsilon:
                return "its steps are not known, and its epsilon is below the run's"
        elif any(type(count) is not int or count < 0 for _, _, count in own["steps"]):
            return "a number of steps is none"
        elif sum(count for _, _, count in own["steps"]) != report.steps + (report.evaluations or 0):
            return f"it has other steps than in {SUMMARY}"
        elif report.noise_multiplier is not None and [report.noise_multiplier, report.sample_rate] not in [
            [sigma, q] for sigma, q, _ in own["steps"]
        ]:
            return f"its noise or its sample rate is not that of {SUMMARY}"
        if private and not math.isclose(own["epsilon"], report.epsilon, rel_tol=SAME):
            return f"epsilon is {own['epsilon']!r}, but {report.epsilon!r} in {SUMMARY}"
        if shared and not _alike(own["epsilon_if_all_others_collude"], report.epsilon_alone):
            return f"epsilon_if_all_others_collude is not that of {SUMMARY}"
        return ""

    def _cards(self) -> None:
        for name in ("adapter", "best"):
            card = self.folder / name / "README.md"
            if not card.is_file():
                continue
            text = card.read_text(encoding="utf-8")
            for section in sections(self.summary, self.settings, best=name == "best"):
                if f"\n\n{section}\n" not in text:
                    raise RunFailed(f"{card}: its section {section.splitlines()[0][3:]} does not say what {SUMMARY} says")

    def audited(self, audit: AuditRecord) -> None:
        """
        Raises:
            RunFailed: the audit is of another claim, or did not survive.
        """
        path = self.folder / AUDITED
        self._of_this_claim(path, "an audit", audit)
        if not audit.survived:
            raise RunFailed(f"{path}: {audit.sentence}")
        if not audit.clopper_pearson <= audit.epsilon or not audit.contracts or any(audit.contracts.values()):
            raise RunFailed(f"{path}: that it survived is not what its numbers say")
        if audit.sites != self.settings.num_supernodes:
            raise RunFailed(f"{path}: is an audit of another run: of {audit.sites} sites, not {self.settings.num_supernodes}")

    def attacked(self, attack: MembershipRecord) -> None:
        """
        Raises:
            RunFailed: the attack is on another claim, or refutes this one.
        """
        path = self.folder / ATTACKED
        self._of_this_claim(path, "an attack", attack)
        if attack.refuted:
            raise RunFailed(f"{path}: {attack.sentence}")

    def _of_this_claim(self, path: Path, kind: str, found: AuditRecord | MembershipRecord) -> None:
        settings = self.settings
        ours = (settings.strategy, settings.trust, settings.privacy.epsilon, settings.privacy.delta)
        if (found.strategy, found.trust, found.epsilon, found.delta) != ours:
            claim = f"ε = {found.epsilon:g} at δ = {found.delta:g}, {found.strategy}, {found.trust}"
            raise RunFailed(f"{path}: is {kind} of another claim: {claim}")

    def _refuse(self, what: str) -> None:
        raise RunFailed(f"{self.folder / CERTIFICATE}: {what}")


def _alike(one: Any, other: Any) -> bool:
    """The same as JSON, types included."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
