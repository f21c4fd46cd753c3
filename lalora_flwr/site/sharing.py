"""What a site holds a secure sum to before it takes part, by its owner's word alone."""

from __future__ import annotations

import logging
from pathlib import Path

from lalora_flwr.ground.errors import ConfigError, SiteRefusal
from lalora_flwr.ledger.caps import Caps
from lalora_flwr.ledger.sharing import Sharing
from lalora_flwr.methods.secure_sum import Attempt, share_of
from lalora_flwr.privacy.mechanism import Mechanism
from lalora_flwr.settings import Settings
from lalora_flwr.site.records import NodeConfig
from lalora_flwr.wire.orders import TrainOrder
from lalora_flwr.wire.sharing import (
    Member,
    Secrets,
    SharingRoster,
    public_bytes,
    read_key,
    read_roster,
    seeded_key,
    written_public,
)

log = logging.getLogger("lalora_flwr.site")


def read_secrets(key: str, roster: str, run: str = "") -> Secrets:
    """The keys that an owner's files hold.

    Args:
        key, roster: paths of the files.
        run: the run's id.

    Raises:
        ConfigError: one of them cannot be read, or they do not belong together.
    """
    try:
        own, text = Path(key).read_bytes(), Path(roster).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"sharing-key or sharing-roster: cannot be read: {error}") from None
    try:
        secrets = Secrets(read_key(own), read_roster(text), run)
        secrets.check()
    except ConfigError as fault:
        raise ConfigError(f"sharing-key {key}, sharing-roster {roster}: {fault}") from None
    return secrets


def seeded_secrets(settings: Settings, site: int, run: str) -> Secrets:
    """Of a virtual site: everybody who knows the run's seed has them."""
    keys = [seeded_key(settings.seed, number) for number in range(settings.num_supernodes)]
    roster = SharingRoster.of(Member(str(number), public_bytes(key)) for number, key in enumerate(keys))
    return Secrets(keys[site], roster, run)


def secrets_of(settings: Settings, caps: Caps | None, node_config: NodeConfig, run_id: int, *, simulated: bool) -> Secrets:
    """What a site masks with: its owner's files; a virtual site without any has keys of the seed.

    Raises:
        SiteRefusal: with a fixed reason.
    """
    if caps and caps.sharing_key:
        try:
            return read_secrets(caps.sharing_key, caps.sharing_roster, str(run_id))
        except ConfigError as fault:
            log.error("%s", fault)
            raise SiteRefusal("sharing: the site cannot use its key or its roster; its own log says why") from None
    if not simulated:
        raise SiteRefusal("sharing: the site's node-config names no sharing-key")
    return seeded_secrets(settings, int(node_config["partition-id"]), str(run_id))


def sharing_of(settings: Settings, caps: Caps | None, order: TrainOrder, secrets: Secrets, mechanism: Mechanism) -> Sharing:
    """What the site takes part in, if its owner's conditions hold.

    Guarantee: with the result's ``colluders`` of the other sites on the server's side, adding no noise and telling it all they
    know, the sum still has at least the noise of ``mechanism``: the sites are of the owner's own roster, at least as many as
    the owner asks for, and the share is large enough. Nothing of it is the server's word, and nothing depends on a record.

    Raises:
        SiteRefusal: with a fixed reason.
    """
    try:
        attempt = Attempt.of(order.exchange)
        share = share_of(attempt, mechanism.clip_norm)
        roster = secrets.roster.only(attempt.sites)
    except KeyError:
        raise SiteRefusal("sharing: the attempt names a site that is not in the owner's roster") from None
    except ValueError:
        raise SiteRefusal("sharing: the words of the attempt are not what they must be") from None
    colluders = max(settings.colluders, caps.sharing_colluders) if caps else settings.colluders
    least = max(colluders + 1, caps.min_sharing_sites if caps else 1)
    if secrets.name not in attempt.sites:
        raise SiteRefusal("sharing: the attempt does not name this site")
    if len(attempt.sites) < least:
        raise SiteRefusal("sharing: the attempt has fewer sites than min-sharing-sites, or no more than may collude")
    if settings.train.local_steps != 1:
        raise SiteRefusal("sharing: a secure sum is one local step")
    if not share.multiplier**2 * (len(attempt.sites) - colluders) >= mechanism.noise_multiplier**2:
        raise SiteRefusal("sharing: the share of the noise is too small for the site's sharing-colluders")
    return Sharing(attempt.number, share.multiplier, len(attempt.sites), colluders, roster.digest, written_public(secrets.own))
