"""What two keys or more must keep to together."""

from __future__ import annotations

from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.lists import listed
from lalora_flwr.settings.choices import DATASETS, METHODS, ChecksSettings
from lalora_flwr.settings.schema import Settings
from lalora_flwr.settings.stages import ridge_stage

MOST_SHARING = 256  # sites of one secure sum: each draws a mask with every other


def check_together(settings: Settings) -> None:
    """Refuse settings of which each is possible and all together are not.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    if settings.model.name == "embedded/vit-digits" and settings.data.name != "digits":
        raise ConfigError(f"data.name = {settings.data.name!r}: embedded/vit-digits only takes digits; set model.name")
    regression = settings.data.problem_type == "regression"
    if settings.data.answer and settings.task != "language":
        raise ConfigError("data.answer: only for language modelling; name data.response, or leave it empty")
    if settings.data.name == "sites" and (settings.data.test == "auto" or settings.data.test.startswith(("split:", "hold-out:"))):
        raise ConfigError("data.test: the server holds no records of data.name = 'sites'; set data.test = 'file:…'")
    _check_problem(settings)
    if settings.data.name == "sites" and not settings.data.labels and settings.task != "language" and not regression:
        raise ConfigError("data.labels: must name the classes for data.name = 'sites', in the same order for every site")
    if settings.data.partition == "natural" and not settings.data.site:
        raise ConfigError("data.site: must name the column that tells the sites apart for data.partition = 'natural'")
    if settings.min_sites > settings.sites_per_round:
        raise ConfigError(f"min-sites = {settings.min_sites}: only {settings.sites_per_round} sites are drawn for a round")
    if settings.resume and not settings.run_name:
        raise ConfigError("run-name: must name the run that resume = true goes on with")
    if settings.train.optimizer == "adamw" and settings.train.momentum:
        raise ConfigError(f"train.momentum = {settings.train.momentum}: only for train.optimizer = 'sgd'; leave it 0 for adamw")
    if settings.train.optimizer == "adamw" and not settings.train.lr:
        raise ConfigError("train.lr = 0: the rule is for train.optimizer = 'sgd'; choose a rate for adamw, such as 0.003")
    _check_steps(settings)
    _check_views(settings)
    _check_ridge(settings)
    rounds = settings.num_rounds - settings.ridge_first
    if settings.rounds_per_site * settings.num_supernodes < rounds * settings.sites_per_round:
        raise ConfigError(
            f"privacy.max-rounds = {settings.privacy.max_rounds}: too few for {rounds} rounds of "
            f"{settings.sites_per_round} of {settings.num_supernodes} sites; raise it or lower fraction-train"
        )


def _check_steps(settings: Settings) -> None:
    """Who takes the step, and who adds the noise."""
    train, n = settings.train, settings.sites_per_round
    if settings.shares_noise and train.step_at == "site":
        raise ConfigError("train.step-at = 'site': must be 'server' or 'auto' for trust = 'secure-sum'")
    if settings.server_steps and train.local_steps != 1:
        why = "trust = 'secure-sum'" if settings.shares_noise else "train.step-at = 'server'"
        raise ConfigError(f"train.local-steps = {train.local_steps}: must be 1 for {why}; raise num-rounds in its place")
    if train.decay != "none" and not settings.server_steps:
        raise ConfigError(f"train.decay = {train.decay!r}: only where the server steps; set train.step-at = 'server'")
    if settings.shares_noise and not settings.private:
        raise ConfigError("trust = 'secure-sum': shares noise, of which privacy.epsilon = inf adds none; leave it 'own-noise'")
    if settings.shares_noise and not settings.colluders < n:
        raise ConfigError(f"colluders = {settings.colluders}: must be below the {n} sites of a round")
    if settings.shares_noise and n > MOST_SHARING:
        raise ConfigError(f"trust = 'secure-sum': at most {MOST_SHARING} sites a round, but {n} are drawn")


def _check_ridge(settings: Settings) -> None:
    """A ridge head first, and then the method."""
    if not settings.ridge_first:
        return
    if settings.strategy == "ridge-head":
        raise ConfigError(
            "lora.head = 'ridge': strategy = 'ridge-head' is that head alone; leave it auto, or choose another strategy"
        )
    if settings.task == "language" or settings.data.problem_type == "regression":
        raise ConfigError("lora.head = 'ridge': predicts classes, which the run has none of; leave it auto")
    if settings.num_rounds < 2:
        raise ConfigError(f"num-rounds = {settings.num_rounds}: at least 2 for lora.head = 'ridge'; the first is the head's")
    if settings.rounds_per_site < 1:
        raise ConfigError(
            f"privacy.max-rounds = {settings.privacy.max_rounds}: must leave a round after those of the ridge head, "
            f"{settings.ridge_rounds}"
        )


def _check_views(settings: Settings) -> None:
    train = settings.train
    if train.augmentations > 1 and settings.task != "image":
        raise ConfigError(f"train.augmentations = {train.augmentations}: only for images; leave it 1 for texts")
    if train.flips and train.augmentations == 1:
        raise ConfigError("train.flips = true: mirrors views of train.augmentations, of which 1 is none; set it to 2 or more")


def _check_problem(settings: Settings) -> None:
    data = settings.data
    names = listed(data.labels)
    if len(set(names)) < len(names):
        raise ConfigError(f"data.labels = {data.labels!r}: a class occurs twice")
    if names and data.num_classes not in (0, len(names)):
        raise ConfigError(f"data.num-classes = {data.num_classes}: data.labels names {len(names)} classes; leave it 0")
    kind = f"data.problem-type = {data.problem_type!r}"
    if data.problem_type != "single-label" and settings.task == "language":
        raise ConfigError(f"{kind}: only without data.response, which makes the task language modelling")
    if data.problem_type == "regression" and not data.label_range:
        raise ConfigError("data.label-range: must give the bounds of the numbers for regression, such as '0,120'")
    if data.problem_type == "regression" and (data.labels or data.num_classes):
        raise ConfigError(
            f"{'data.labels' if data.labels else 'data.num-classes'}: only for classes; leave it out for regression"
        )
    if data.label_range and data.problem_type != "regression":
        raise ConfigError(f"data.label-range = {data.label_range!r}: only for data.problem-type = 'regression'")
    by_class = ("dirichlet", "pathological") if data.problem_type == "regression" else ("dirichlet", "pathological", "shards")
    if data.problem_type != "single-label" and data.partition in by_class:
        others = "iid, size-skewed or natural" + (", or shards" if data.problem_type == "regression" else "")
        raise ConfigError(f"data.partition = {data.partition!r}: needs one class per record; choose {others}")


def check_choices(settings: Settings) -> None:
    """Ask the data set and the method that the settings name; importing them takes a second or two.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    if ":" not in settings.data.name and settings.data.name != "sites":
        DATASETS.get(settings.data.name, ChecksSettings).check(settings)
    METHODS.get(settings.strategy, ChecksSettings).check(settings)
    if settings.ridge_first:
        stage = ridge_stage(settings)
        METHODS.get(stage.strategy, ChecksSettings).check(stage)
