"""What travels between the server and a site: one rule, used by both and by the plan."""

from __future__ import annotations

from dataclasses import dataclass

from lalora_flwr.adapter.slots import HEAD, LORA_B, Layout, Mask
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.wire.profile import PRECISIONS, Profile


@dataclass(frozen=True)
class Turn:
    """One round as the server and the site know it alike.

    Attributes:
        layout: the slots as the site holds them.
        trained: those that train in the round.
        ever: those that train in any round.
    """

    layout: Layout
    trained: Mask
    ever: Mask


class Travel:
    """What a site holds, gets and sends.

    A slot that does not travel down must be one that every site can derive, since it never trains and the seed draws it, or one
    that stays at the site. The site checks by digest that it starts where the server means it to, as far as the server knows.

    Attributes:
        brings_all: whether every slot goes down that does not stay at the sites, those that never train among them.
        takes_profiles: whether sites differ by what their profiles say.
        keeps: parts whose slots stay at the sites: each site has values of its own, from its first round to its last.
    """

    brings_all: bool = True
    takes_profiles: bool = False
    keeps: frozenset[str] = frozenset()

    def kept(self, layout: Layout) -> Mask:
        """The slots that stay at the site. None of them goes down or comes up."""
        return layout.of(*self.keeps)

    def check(self, profile: Profile) -> None:
        """
        Raises:
            ConfigError: the method can make nothing of the profile.
        """
        if profile.told.wrong:
            raise ConfigError(
                f"profile = {profile.words!r}: batch must be a whole number from 1, and precision one of {', '.join(PRECISIONS)}"
            )

    def held(self, layout: Layout, profile: Profile) -> Layout:
        """The slots as a site of this profile holds them: all of them, each whole or a leading corner of it."""
        return layout

    def trains(self, layout: Layout, profile: Profile) -> Mask:
        """The slots that a site of this profile ever trains, of those that it holds; what else it holds stays as it was sent."""
        return layout.names

    def steps(self, most: int, profile: Profile) -> int:
        """The local steps that a site of this profile takes where the run says ``most``: the first of them, at least one."""
        return most

    def down(self, turn: Turn) -> Mask:
        """The slots that go to the site."""
        raise NotImplementedError

    def up(self, turn: Turn) -> Mask:
        """The slots that come back."""
        raise NotImplementedError


class Everything(Travel):
    """All slots in both directions, in every round."""

    def down(self, turn: Turn) -> Mask:
        return turn.layout.names

    def up(self, turn: Turn) -> Mask:
        return turn.layout.names


class Trained(Travel):
    """Down what ever trains, up what trained in the round."""

    brings_all = False

    def down(self, turn: Turn) -> Mask:
        return turn.ever

    def up(self, turn: Turn) -> Mask:
        return turn.trained


class EverythingDown(Travel):
    """Down all slots, as the server may change those that do not train; up what trained in the round."""

    def down(self, turn: Turn) -> Mask:
        return turn.layout.names

    def up(self, turn: Turn) -> Mask:
        return turn.trained


class ShareA(Travel):
    """Down all of lora_A, and up what of it trained in the round; lora_B and a trained head stay at the site."""

    keeps = frozenset({LORA_B, HEAD})

    def down(self, turn: Turn) -> Mask:
        return turn.layout.names - self.kept(turn.layout)

    def up(self, turn: Turn) -> Mask:
        return turn.trained - self.kept(turn.layout)


class GradientsUp(Travel):
    """As another travel, but what comes up are the noised gradients of what trained in the round and does not stay."""

    def __init__(self, travel: Travel) -> None:
        self._travel, self.brings_all = travel, travel.brings_all
        self.takes_profiles, self.keeps = travel.takes_profiles, travel.keeps

    def check(self, profile: Profile) -> None:
        self._travel.check(profile)

    def held(self, layout: Layout, profile: Profile) -> Layout:
        return self._travel.held(layout, profile)

    def trains(self, layout: Layout, profile: Profile) -> Mask:
        return self._travel.trains(layout, profile)

    def steps(self, most: int, profile: Profile) -> int:
        return self._travel.steps(most, profile)

    def down(self, turn: Turn) -> Mask:
        return self._travel.down(turn)

    def up(self, turn: Turn) -> Mask:
        return turn.trained - self.kept(turn.layout)


EVERYTHING_DOWN = EverythingDown()
EVERYTHING = Everything()
TRAINED = Trained()
SHARE_A = ShareA()
