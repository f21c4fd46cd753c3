"""What a method is: a few choices, each an object."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace

from lalora_flwr.adapter.form import AdapterForm
from lalora_flwr.adapter.slots import LORA_A, LORA_B, Layout, Mask
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.methods.filters import NONE, Filter, filter_of
from lalora_flwr.methods.keeping import check_keeps, check_shares
from lalora_flwr.methods.merges import MEAN, Merge
from lalora_flwr.methods.schedules import MOST_LOOKED_AT, Later, Schedule, schedule_of
from lalora_flwr.methods.secure_sum import SECURE_SUM
from lalora_flwr.methods.transport import PLAIN, Transport
from lalora_flwr.methods.travel import EVERYTHING, EVERYTHING_DOWN, GradientsUp, Travel, Turn
from lalora_flwr.settings import Settings
from lalora_flwr.settings.choices import FORMS, MERGES, METHODS, TRAVELS
from lalora_flwr.wire.profile import Profile
from lalora_flwr.wire.public import Public


@dataclass(frozen=True)
class Method:
    """A federated method. Its name is in `lalora_flwr.settings.choices`, or an entry point of ``lalora.methods``.

    Attributes:
        schedule: which slots train at round t, local step k.
        filter: what happens to the gradient after the noise.
        travel: what goes down and comes up.
        merge: how the server combines.
        transport: how updates reach the server.
        form: what is trained on top of the frozen model, a name of the registry of forms.
        server_steps: whether sites send the noised gradients of one step, and filter and optimizer are the server's.
        full_batch: whether a step is meant to take all records of a site, so that nobody need be told that sampling adds nothing.
        own_rate: the learning rate where ``train.lr`` is 0; 0: that of the rule in `lalora_flwr.training.rate`.
        average: whether a running average of the rounds' adapters is evaluated and saved in place of the last.
    """

    schedule: Schedule
    filter: Filter = NONE
    travel: Travel = EVERYTHING
    merge: Merge = MEAN
    transport: Transport = PLAIN
    form: str = "lora"
    average: bool = False
    own_rate: float = 0.0
    full_batch: bool = False
    server_steps: bool = False

    def of(self, settings: Settings) -> Method:
        """The method of a run: what ``lora.*``, ``filter.name`` and ``merge.*`` name replaces its own.

        Raises:
            ConfigError: an unknown name.
        """
        schedule, filter, merge = settings.lora.schedule, settings.filter.name, settings.merge.name
        chosen = self.schedule if schedule == "auto" else schedule_of(schedule)
        chosen = chosen.by_round() if settings.train.local_steps == 1 else chosen
        travel = self.travel if settings.merge.travel == "auto" else TRAVELS.get(settings.merge.travel, Travel)
        if settings.lora.start_from and settings.merge.travel == "auto" and not travel.brings_all:
            travel = EVERYTHING_DOWN  # no seed gives what does not train
        return replace(
            self,
            form=self.form if settings.lora.form == "auto" else settings.lora.form,
            schedule=Later(chosen, 1) if settings.ridge_first else chosen,
            filter=self.filter if filter == "auto" else filter_of(filter),
            merge=self.merge if merge == "auto" else MERGES.get(merge, Merge),
            average=self.average if settings.merge.average == "auto" else settings.merge.average == "ema",
            travel=GradientsUp(travel) if settings.server_steps else travel,
            server_steps=settings.server_steps,
            transport=SECURE_SUM if settings.shares_noise else self.transport,
        )

    @property
    def form_of(self) -> AdapterForm:
        """Its form."""
        return FORMS.get(self.form, AdapterForm)

    @property
    def sites_remember(self) -> bool:
        """Whether sites keep something from round to round: what the filter remembers, or slots that stay with them."""
        return (self.filter.remembers and not self.server_steps) or bool(self.travel.keeps)

    def masks(self, layout: Layout, server_round: int, local_steps: int, directive: Public, profile: Profile) -> tuple[Mask, ...]:
        """The slots that train at each step of a round at a site that holds ``layout``: the schedule's that the site trains.

        ``local_steps``: the run's, of which the site may take fewer.
        """
        own, steps = self.travel.trains(layout, profile), self.travel.steps(local_steps, profile)
        return tuple(mask & own for mask in self.schedule.masks(layout, server_round, steps, directive))

    def turn(self, layout: Layout, server_round: int, local_steps: int, directive: Public, profile: Profile) -> Turn:
        """A training round of the run's ``local_steps`` at a site of this profile that holds ``layout``."""
        steps = self.travel.steps(local_steps, profile)
        trained = self.schedule.trained_in(layout, server_round, steps, directive) & self.travel.trains(layout, profile)
        return Turn(layout, trained, self.schedule.ever(layout))

    def at_rest(self, layout: Layout) -> Turn:
        """Between rounds, when the adapter is only looked at."""
        ever = self.schedule.ever(layout)
        return Turn(layout, ever, ever)

    def check_moves(self, layout: Layout, settings: Settings) -> None:
        """Refuse a run whose steps would spend budget and move nothing, since none of them trains what starts at zero.

        Raises:
            ConfigError: the schedule or the filter does not fit the form, or never trains the form's gate.
        """
        self.schedule.fits(layout)
        self.filter.fits(layout)
        self.filter.check(self, layout, settings)
        gate, directive = layout.of(self.form_of.gate), self.merge.start(layout)
        check_shares(self, layout, settings)
        if not self.schedule.accepts(layout, directive):
            raise ConfigError(
                f"lora.schedule = {self.schedule.text!r}: does not take the directives of merge.name = {self.merge.name!r}; "
                "change one of them"
            )
        trained = self.schedule.ever(layout)
        if self.filter.only_scales and all(self.filter.scale(layout[name]) == 1 for name in trained):
            raise ConfigError(f"filter.name = {self.filter.name!r}: scales nothing that {self.schedule.text!r} trains; take none")
        if not directive:  # else later rounds may train other slots than the first
            steps, rounds = settings.train.local_steps, range(1, min(settings.num_rounds, MOST_LOOKED_AT) + 1)
            trained = frozenset().union(*(self.schedule.trained_in(layout, t, steps, directive) for t in rounds))
            if settings.private and settings.privacy.clipping == "apart":
                self._check_apart(layout, {mask for t in rounds for mask in self.schedule.masks(layout, t, steps, directive)})
        if gate and not trained & gate:
            part = layout[min(gate)].part
            raise ConfigError(
                f"lora.schedule = {self.schedule.text!r}: no step of the run trains {part}, which starts at zero: what depends "
                "on it has no gradient and takes on noise alone; let it train too"
            )

    def _check_apart(self, layout: Layout, steps: Set[Mask]) -> None:
        lora_A = layout.of(LORA_A)
        if not any(mask & lora_A and mask - lora_A for mask in steps):
            raise ConfigError(
                f"privacy.clipping = 'apart': no step of {self.schedule.text!r} trains lora_A beside anything else, so "
                "nothing is clipped apart; set lora.schedule = 'both', or take norm"
            )

    def check(self, settings: Settings) -> None:
        """Refuse settings that the method cannot run with.

        Raises:
            ConfigError: naming the key, the value and what is allowed.
        """
        own = self.of(settings)
        name = own.merge.name
        own.form_of.check(own.form, settings)
        check_keeps(own, settings)
        if own.server_steps and own.travel.keeps and (key := unknown_noise(own, settings) or _decay(settings)):
            raise ConfigError(
                f"{key}: where the server steps, a site's step on what stays with it is plain SGD; leave it, or set "
                "train.step-at = 'site'"
            )
        if parts := own.form_of.parts:
            own.schedule.fits_parts(parts)
            if missing := sorted(own.merge.needs_parts - parts):
                raise ConfigError(f"merge.name = {name!r}: combines {missing[0]}, which the form {own.form!r} does not train")
        if own.merge.moves_frozen and not own.travel.brings_all:
            raise ConfigError(
                f"merge.travel = {settings.merge.travel!r}: the merge {name!r} changes what does not train, so all of it must go "
                "down; take everything-down"
            )
        if settings.lora.start_from and not own.travel.brings_all:
            raise ConfigError(f"merge.travel = {settings.merge.travel!r}: no seed gives an earlier adapter; take everything-down")
        if settings.lora.start_from and (settings.ridge_first or own.form == "ridge-head"):
            raise ConfigError(f"lora.start-from = {settings.lora.start_from!r}: cannot start from a ridge head too")
        if settings.sites_per_round < (needed := own.merge.least_updates(settings.merge)):
            raise ConfigError(f"merge.name = {name!r}: needs {needed} sites a round, but {settings.sites_per_round} are drawn")
        if settings.server_steps and not own.merge.takes_gradients:
            raise ConfigError(f"merge.name = {name!r}: combines adapters, and no gradients as where the server takes the step")
        if own.merge.rewrites and own.filter.remembers:
            raise ConfigError(
                f"filter.name = {settings.filter.name!r}: {own.filter.name} remembers gradients, of factors that {name!r} turns "
                "after each round; choose a filter without a memory, such as none"
            )
        if not (own.filter.keeps or own.own_rate or settings.train.lr):
            raise ConfigError(
                f"train.lr = 0: the rule does not know what filter.name = {own.filter.name!r} leaves of the noise; choose a rate"
            )
        if own.filter.only_scales and settings.train.optimizer == "adamw":
            raise ConfigError(
                f"filter.name = {own.filter.name!r}: multiplies gradients by a constant, which train.optimizer = 'adamw' undoes; "
                "take sgd, or another filter"
            )
        if own.travel.takes_profiles and not own.merge.takes_parts:
            raise ConfigError(
                f"merge.name = {name!r}: takes whole adapters, but {settings.strategy} lets sites differ; choose auto, "
                "per-entry, zero-padded, product-svd or product-svd-split"
            )
        if parts and own.travel.takes_profiles and not {LORA_A, LORA_B} <= parts:
            raise ConfigError(
                f"lora.form = {own.form!r}: sites of {settings.strategy} differ in the ranks of lora_A and lora_B, which the "
                "form does not train; choose lora or lora-residual, or another strategy"
            )
        for profile in (Profile(site, settings.words_of(site)) for site in range(settings.kinds_of_sites)):
            own.travel.check(profile)
            if (profile.told.parts or profile.told.unknown) and not own.travel.takes_profiles:
                raise ConfigError(
                    f"profiles = {settings.profiles!r}: sites of {settings.strategy} do not differ but in batch and precision; "
                    "choose hetlora, flexlora, hlora or flora"
                )
        if own.transport.hides_updates and own.merge.needs_each:
            raise ConfigError(f"merge.name = {name!r}: needs every site's update, but {own.transport.name} shows their sum only")
        if own.transport.hides_updates and settings.merge.max_update_norm:
            bound = settings.merge.max_update_norm
            raise ConfigError(f"merge.max-update-norm = {bound:g}: {own.transport.name} hides single updates; leave it 0")


def unknown_noise(method: Method, settings: Settings) -> str:
    """Which key makes a site's steps more than a sum of noised gradients times the rate; empty if none does.

    Only of such a sum is it known how much of an update is noise. Where the server steps it gets the gradients themselves.
    """
    train = settings.train
    if train.optimizer != "sgd":
        return f"train.optimizer = {train.optimizer!r}"
    if train.momentum or train.weight_decay:
        return f"train.momentum = {train.momentum:g}" if train.momentum else f"train.weight-decay = {train.weight_decay:g}"
    return "" if method.filter is NONE else f"filter.name = {method.filter.name!r}"


def _decay(settings: Settings) -> str:
    return "" if settings.train.decay == "none" else f"train.decay = {settings.train.decay!r}"


def served_by(settings: Settings, profile: Profile) -> Settings:
    """The run's settings as a site of this profile serves them: its local steps, from which its noise, its limits, its price and
    the rule's learning rate follow, and what its machine bears.

    The method itself is that of the run's own settings, whatever a site takes of it.
    """
    if not profile.words:
        return settings
    told, train, model = profile.told, settings.train, settings.model
    steps = method_of(settings).travel.steps(train.local_steps, profile)
    batch = min(told.batch, train.max_physical_batch or told.batch) if told.batch else train.max_physical_batch
    train = replace(train, local_steps=steps, max_physical_batch=batch)
    return replace(settings, train=train, model=replace(model, dtype=told.precision or model.dtype))


def method_of(settings: Settings) -> Method:
    """The method of a run, with what its settings override.

    Raises:
        ConfigError: an unknown name.
    """
    return METHODS.get(settings.strategy, Method).of(settings)
