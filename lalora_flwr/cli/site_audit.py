"""``lalora site check --audit``: does the installed code keep what a site's owner is promised?"""

from __future__ import annotations

import dataclasses

from lalora_flwr.audit.audit import audit
from lalora_flwr.cli.site import FAULT, OK, Finding
from lalora_flwr.ledger.caps import caps_from
from lalora_flwr.settings import Settings, settings_from
from lalora_flwr.site.records import NodeConfig

MOST_RECORDS = 100_000  # of the audited site: more make no difference but to memory
ROUNDS = 10  # of ten steps


def audited(node_config: NodeConfig) -> Finding:
    """An audit of a run that spends all of the owner's budget on one site, with as many records as the owner declares.

    The model is the embedded one, since gradients are replaced anyway; what is audited is the code, at the site's ε, δ and q.
    """
    caps = caps_from(node_config, needed=True)
    assert caps is not None
    settings: Settings = settings_from({"num-supernodes": 1, "max-failures": 0, "num-rounds": ROUNDS})
    privacy = dataclasses.replace(settings.privacy, epsilon=caps.max_epsilon, delta=caps.delta)
    found = audit(dataclasses.replace(settings, privacy=privacy), sizes={0: min(caps.num_records, MOST_RECORDS)})
    return Finding(OK if found.survived else FAULT, "audit", found.sentence)
