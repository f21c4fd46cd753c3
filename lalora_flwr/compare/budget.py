"""Whether the compared runs had the same budget, in words."""

from __future__ import annotations

from collections.abc import Sequence

from lalora_flwr.compare.grid import EPSILON, LR, label_of
from lalora_flwr.compare.results import Result, metric_name, varying
from lalora_flwr.settings import Kind, keys_of


def differences(final: Sequence[Result]) -> list[str]:
    """The budget keys that differ, each with its values."""
    return [_values(key, final) for key in varying(final) if key in keys_of(Kind.BUDGET)]


def _values(key: str, final: Sequence[Result]) -> str:
    found = list(dict.fromkeys("unset" if key not in r.values else label_of(r.values[key]) or "empty" for r in final))
    return f"{key} ({', '.join(found)})"


def rule(final: Sequence[Result], tuned: str | None) -> list[str]:
    """The equal-budget rule as it holds for these runs, or in which keys it does not hold."""
    parts = []
    differ = differences(final)
    if differ:
        parts.append(f"**NOT an equal-budget comparison**: {', '.join(differ)} differ{'s' if len(differ) == 1 else ''}.")
    else:
        parts.append("Equal budget: " + _equal(final, tuned) + ".")
    if differ and tuned:
        parts.append(tuned[0].upper() + tuned[1:] + ".")
    models = [key for key in varying(final) if key.startswith("model.")]
    if models:
        parts.append(f"The runs differ in the base model: {', '.join(_values(key, final) for key in models)}.")
    return parts


def _equal(final: Sequence[Result], tuned: str | None) -> str:
    values = final[0].values
    lrs = sorted({result.lr for result in final})
    seeds = sorted({int(result.values["seed"]) for result in final})
    rates = [label_of(lr) if lr else "by rule" for lr in lrs]
    lr = tuned or (f"learning rate {rates[0]}" if len(lrs) == 1 else f"{LR} differs ({', '.join(rates)})")
    return (
        f"same ε in a column and δ = {values['privacy.delta']:g}; same {values['num-rounds']} rounds, "
        f"{values['train.local-steps']} local steps and expected batch of {values['train.batch-size']} on "
        f"{values['num-supernodes']} sites; {metric_name(final)} of the last round; {lr}; "
        f"{len(seeds)} seed{'s' * (len(seeds) != 1)} ({', '.join(map(str, seeds))}); "
        f"model {values['model.name']}, data {values['data.name']}"
    )


def privacy(final: Sequence[Result], tuned: bool) -> list[str]:
    """What the ε of the table means, and what it does not cover."""
    done = [result for result in final if not result.failure]
    private = [result for result in done if result.summary and result.summary.private]
    parts = []
    if private:
        what = f"Privacy: {EPSILON} is the most that any site may spend in one run, for one of its records."
        if any(result.seeded for result in private):
            what += " The runs are seeded, so ε describes the mechanism and not the secrecy of these very runs."
        if tuned:
            what += " The tuning runs read the same private records; their ε comes on top and is not in the table."
        elif len(private) > 1:
            what += " Each run spends its ε anew on the same records; the table does not add them up."
        parts.append(what)
    shared = [result.summary for result in private if result.summary and result.summary.epsilon_alone is not None]
    if shared:
        may = ", ".join(map(str, sorted({summary.colluders or 0 for summary in shared})))
        worst = max(summary.epsilon_alone or 0.0 for summary in shared)
        parts.append(
            f"With trust = secure-sum sites share one noise: ε then holds if at most {may} of the other sites side with the "
            f"server, and is up to {worst:.3g} if all of them do."
        )
    if len(private) < len(done):
        parts.append("Runs with ε = inf are non-private: no clip, no noise, no guarantee.")
    return parts
