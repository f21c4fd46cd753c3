"""``privacy.json``: what a run claims of privacy, whence each number is, and the digests of all that the claim is about.

Names follow NIST SP 800-226 (privacy unit, neighbouring data sets, trust model, mechanism, accounting). The server vouches for
it: ε is its own count of what it asked each site for, at the σ and q that the site said and the run prescribes. What a site says
itself is its ledger.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lalora_flwr import __version__
from lalora_flwr.ground.files import file_digest
from lalora_flwr.ledger.verify import SECOND
from lalora_flwr.privacy.accounting import epsilon_spent
from lalora_flwr.privacy.mechanism import APART
from lalora_flwr.server.counts import SiteCounts
from lalora_flwr.server.metrics import CONFIG, METRICS, Summary
from lalora_flwr.settings import Settings

CERTIFICATE, READABLE = "privacy.json", "PRIVACY.md"
FORMAT = 1
COVERED = ("adapter", "best", "checkpoint", "plots")  # folders whose files a certificate is about
MAKERS = {"pld": ("lalora-flwr",), "prv": ("opacus",), "rdp": ("opacus",)}
ROOT = Path(__file__).parents[1]
SHARED = "secure sum: at most {} of the other sites side with the server"
SEEDED = "seeded: epsilon describes the mechanism, not the secrecy of this run"
TOGETHER = "records clipped to clip_norm, jointly over all that trains"
IN_PARTS = (
    f"where lora_A trains beside other tensors, records clipped to {APART:g} clip_norm over lora_A and to "
    f"{math.sqrt(1 - APART**2):.3g} clip_norm over all else, clip_norm altogether; elsewhere to clip_norm"
)
VOUCHES = "the server: its own count of steps, at the noise and sampling rate that the site said and the run prescribes"


def certificate(settings: Settings, counts: SiteCounts, summary: Summary, run_ids: Sequence[str]) -> dict[str, Any]:
    """All but the digests of files, as plain JSON.

    Args:
        settings: the run's.
        counts: of its sites.
        summary: of the run.
        run_ids: by which ledgers of real sites know the run and those that it resumed; none in a simulation.
    """
    return {
        **claims(settings, summary),
        "run_ids": list(run_ids),
        "sites": {str(site): _site(counts, site, settings) for site in counts.heard()},
        "code": {"version": __version__, "commit": summary.commit, "digest": code_digest()},
    }


def claims(settings: Settings, summary: Summary) -> dict[str, Any]:
    """What follows from the run's settings and its summary alone, so that whoever verifies makes it anew."""
    privacy, second = settings.privacy, SECOND[settings.privacy.accountant]
    return {
        "format": FORMAT,
        "run": settings.run_name,
        "date": summary.date,
        "differentially_private": settings.private,
        "privacy_unit": "one record of one site",
        "neighbouring_datasets": "one record more or less",
        "trust_model": SHARED.format(settings.colluders) if settings.shares_noise else "each site adds noise of its own",
        "observers": "the server, the other sites, whoever reads the adapter",
        "mechanism": f"Poisson-subsampled Gaussian, each local step; {IN_PARTS if privacy.clipping == 'apart' else TOGETHER}",
        "epsilon": summary.epsilon if settings.private else None,
        "epsilon_if_all_others_collude": summary.epsilon_alone,
        "delta": privacy.delta,
        "epsilon_of_the_run": privacy.epsilon if settings.private else None,
        "clip_norm": privacy.clip_norm,
        "clipping": privacy.clipping,
        "accountant": privacy.accountant,
        "second_accountant": second,
        "accountants_of": {name: _maker(name, summary.versions) for name in sorted({privacy.accountant, second})},
        "random_numbers": SEEDED if summary.seeded else "the operating system of each site",
        "not_covered": not_covered(summary),
        "records": settings.data.name if summary.seeded else "identified in the ledgers of the sites; the server never sees them",
        "vouched_by": VOUCHES,
        "utility": utility(summary),
        "base_model": {"name": settings.model.name, "revision": summary.model_revision, "digest": summary.model_digest},
    }


def _site(counts: SiteCounts, site: int, settings: Settings) -> dict[str, Any]:
    """One site's steps, from which ε follows."""
    steps, delta = counts.steps_as_told(site), settings.privacy.delta
    found: dict[str, Any] = {"steps": [list(event) for event in steps] if steps is not None else None}
    if settings.shares_noise:
        found["steps_alone"] = [list(event) for event in counts.steps_alone_as_told(site)]
        found["epsilon_if_all_others_collude"] = counts.epsilon_alone_of(site)
    if settings.private:
        found["epsilon"] = counts.epsilon_of(site)
        if steps is not None:
            found["epsilon_by_second_accountant"] = epsilon_spent(steps, delta, SECOND[settings.privacy.accountant])
    return found


def not_covered(summary: Summary) -> list[str]:
    """What ε leaves out."""
    return [text for text in (summary.leaks, summary.earlier) if text]


def utility(summary: Summary) -> dict[str, Any]:
    """What the budget bought: the headline metric on public records before and after; None: it is no number."""
    before, after = (
        figure if figure is not None and math.isfinite(figure) else None for figure in (summary.frozen_score, summary.score)
    )
    return {"metric": summary.metric, "before": before, "after": after}


def _maker(accountant: str, versions: Mapping[str, str]) -> str:
    """Which package's code an accountant is, with its version and that of what it computes with."""
    return ", ".join(f"{name} {versions.get(name, '')}".rstrip() for name in (*MAKERS[accountant], "numpy", "scipy"))


def code_digest(root: Path = ROOT) -> str:
    """Of all Python files of this package, by name and content."""
    sha = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        sha.update(f"{path.relative_to(root).as_posix()}\0{file_digest(path)}\n".encode())
    return sha.hexdigest()


def digests(folder: Path, more: Mapping[str, bytes]) -> dict[str, str]:
    """SHA-256 of the files of a run's folder that a certificate is about, and of ``more``, by name."""
    below = [path for name in COVERED for path in (folder / name).rglob("*") if path.is_file()]
    names = [CONFIG, METRICS, *(path.relative_to(folder).as_posix() for path in below)]
    found = {name: file_digest(folder / name) for name in names if (folder / name).is_file()}
    return dict(sorted({**found, **{name: hashlib.sha256(content).hexdigest() for name, content in more.items()}}.items()))


def sealed(about: Mapping[str, Any], files: Mapping[str, str]) -> str:
    """The text of ``privacy.json``: with the digests of files, and last one of everything else in it."""
    whole = {**about, "files": dict(files)}
    return json.dumps({**whole, "digest": seal(whole)}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def seal(whole: Mapping[str, Any]) -> str:
    """The digest of a certificate's content."""
    canonical = json.dumps(whole, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def readable(whole: Mapping[str, Any]) -> str:
    """``PRIVACY.md``: the same for people; it follows from ``privacy.json`` alone."""
    if whole["differentially_private"]:
        claim = f"Each site's ε is at most **{whole['epsilon']:.4g}** at δ = {whole['delta']:g}, for {whole['privacy_unit']}."
        if whole["epsilon_if_all_others_collude"] is not None:
            claim += f" If all other sites side with the server, it is {whole['epsilon_if_all_others_collude']:.4g}."
    else:
        claim = "**This run is not differentially private.**"
    lines = [f"# Privacy of the run {whole['run']}", "", claim, "", "| | |", "|---|---|"]
    names = ["privacy_unit", "neighbouring_datasets", "trust_model", "observers", "mechanism", "clip_norm", "clipping"]
    names += ["accountant", "second_accountant", "random_numbers", "records", "vouched_by", "date"]
    lines += [f"| {name.replace('_', ' ')} | {whole[name]} |" for name in names]
    lines += [f"| {name} is of | {maker} |" for name, maker in whole.get("accountants_of", {}).items()]
    if utility := whole.get("utility"):
        before, after = ("none" if value is None else f"{value:.4f}" for value in (utility["before"], utility["after"]))
        lines += [f"| utility on public records | {utility['metric']} {before} before, {after} after |"]
    lines += [f"| not covered | {text} |" for text in whole["not_covered"]]
    lines += [f"| base model | {whole['base_model']['name']}, digest {whole['base_model']['digest']} |"]
    lines += [f"| code | {whole['code']['version']}, digest {whole['code']['digest']} |", ""]
    lines += ["| site | steps: σ, q, how many | ε | ε by the second accountant |", "|---|---|---|---|"]
    for site, own in whole["sites"].items():
        steps = "; ".join(f"{sigma:.4g}, {q:.4g}, {count}" for sigma, q, count in own["steps"] or ()) or "not known"
        epsilon, second = (f"{own[name]:.4g}" if name in own else "" for name in ("epsilon", "epsilon_by_second_accountant"))
        lines.append(f"| {site} | {steps} | {epsilon} | {second} |")
    return "\n".join([*lines, "", "`lalora verify` recomputes every number and every digest.", ""])
