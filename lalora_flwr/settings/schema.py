"""The run-config keys, grouped: names, defaults, documentation and ranges. Nothing here needs another key.

The key of a field is its name in kebab-case behind the name of its group: ``settings.privacy.clip_norm`` is
``privacy.clip-norm``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from lalora_flwr.settings.choices import FILTERS, FORMS, MERGES, METHODS, SCHEDULES, TRAVELS
from lalora_flwr.settings.data_keys import DataSettings
from lalora_flwr.settings.keys import Kind, at_least, choice, key, named, non_negative, whole, within
from lalora_flwr.settings.privacy_keys import PrivacySettings
from lalora_flwr.settings.train_keys import TrainSettings

ROUNDS_A_REPEAT = 20  # by default the noise has room for one repeat of a spoilt secure sum in so many rounds
LONGEST_NAME = 200  # bytes of a run's name; file systems take 255
BUDGET, PERFORMANCE, PLACE = Kind.BUDGET, Kind.PERFORMANCE, Kind.PLACE


def _each_once(names: str) -> bool:
    found = names.split(",") if names.strip() else []
    return all(name.strip() for name in found) and len({name.strip() for name in found}) == len(found)


@dataclass(frozen=True)
class ModelSettings:
    """The frozen base model."""

    name: str = key(
        "embedded/vit-digits",
        "embedded/vit-digits; timm/<name or folder>, an image classifier; hf/<repository or folder>, a text model",
        "embedded/vit-digits, timm/<name or folder> or hf/<repository or folder>",
        lambda v: v == "embedded/vit-digits" or any(v.startswith(f) and len(v) > len(f) for f in ("timm/", "hf/")),
    )
    revision: str = key("", "commit, tag or branch of a model from the hub; empty: its main branch")
    dtype: str = choice(
        "float32",
        "precision of the frozen weights (factors, norms, clip and noise stay float32); auto: bfloat16 where it is fast; nf4: "
        "linear layers in four bits, the rest as auto (needs the extra 4bit)",
        "float32",
        "bfloat16",
        "nf4",
        "auto",
    )
    pretrained: bool = key(True, "load the published weights (from a folder, or once from the hub); false: random weights")
    pooling: str = choice(
        "auto",
        "how hf/ text classifiers make one vector of a text: model (the architecture's own), mean (over its tokens); auto: mean "
        "for sentence-transformers folders that say so",
        "auto",
        "model",
        "mean",
    )


@dataclass(frozen=True)
class LoraSettings:
    """The adapter."""

    form: str = named(
        "auto",
        "what is trained on the frozen model: auto (the strategy's own); lora; bitfit (biases); bottleneck (small layers behind "
        "attention and MLP); soft-prompt (vectors before a text); visual-prompt (tokens of a ViT); pixel-prompt (an image's "
        "border); head (the classification head alone)",
        FORMS,
        "auto",
    )
    size: int = whole(
        0,
        4096,
        0,
        "units of a bottleneck, tokens of a soft or visual prompt, pixels of a pixel prompt's border; 0: 16, 10, 10, an eighth "
        "of the side",
    )
    rank: int = whole(1, 4096, 4, "rank r of every adapter")
    alpha: float = within(1e-3, 1e5, 8.0, "the adapter's output is scaled by alpha / rank")
    targets: str = key("auto", "comma-separated module names that get an adapter; auto takes the model's usual ones")
    dropout: float = key(0.0, "dropout on the adapter's input", "a number in [0, 1)", lambda v: 0 <= v < 1)
    head: str = choice(
        "auto",
        "classification head: frozen; trained at every step inside the same joint clip; ridge: the first round releases a ridge "
        "head (strategy = ridge-head), from which the others train on; auto: trained if it is new, since the published weights "
        "have none for the run's classes",
        *("auto", "frozen", "trained", "ridge"),
    )
    start_from: str = key(
        "",
        "folder of an earlier adapter of the same form, rank, targets and head to start from (lalora run --from), read by the "
        "server; empty: a new one from the seed",
    )
    schedule: str = named(
        "auto",
        "which factor trains when: auto (the strategy's own); step:BA, step:BBA, step:B3A2, … by step; round:BA, … by round",
        SCHEDULES,
        "auto",
    )


@dataclass(frozen=True)
class FilterSettings:
    """What happens to a gradient after the noise (free under differential privacy)."""

    name: str = named(
        "auto",
        "auto (the strategy's own); none; gauss5 (5-tap binomial along the features), gauss:W (W taps), gauss5-permuted and "
        "gauss-permuted:W (their control: along the features in a fixed random order), gauss-adaptive (a width that follows the "
        "noise); wiener (rank components shrunk by their share of noise, against the best); doppler, disk (low-pass over the "
        "steps: doppler:0.9, disk:0.7); kalman (disk as published, of gradients at two points, in two passes a step: "
        "kalman:0.7); slow-a (lora_A at a tenth of the rate); precondition (LA-LoRA's Theorem 2; needs a train.lr)",
        FILTERS,
        "auto",
    )


@dataclass(frozen=True)
class MergeSettings:
    """How the server combines the replies, and how far it trusts a single one (free under differential privacy)."""

    name: str = named(
        "auto",
        "auto (the strategy's own), mean, or of each coordinate over the sites: median or trimmed-mean, which a few lying sites "
        "cannot move far; the others are those of hetlora, flexlora and hlora",
        MERGES,
        "auto",
    )
    travel: str = named(
        "auto",
        "what goes down to the sites and comes up: auto (the strategy's own); everything; trained (down what ever trains, up "
        "what trained in the round); everything-down (up what trained in the round); share-a (both lora_A alone, lora_B and a "
        "trained head stay at the sites)",
        TRAVELS,
        "auto",
    )
    trim: float = key(
        0.2,
        "share of the replies that merge.name = trimmed-mean leaves out at each end of a coordinate",
        "a number between 0 and 0.5, both excluded",
        lambda v: 0 < v < 0.5,
    )
    average: str = choice(
        "auto",
        "which adapter is evaluated and saved: auto (the strategy's own choice), last (that of the last round), ema (a running "
        "average over about the last quarter of the rounds; training goes on from the last)",
        "auto",
        "last",
        "ema",
    )
    max_update_norm: float = non_negative(
        0.0, "L2 bound on a site's update, over all it sends together: a longer one is scaled down to it; 0: no bound"
    )


@dataclass(frozen=True)
class Settings:
    """Every run-config key, validated. Build it with `settings_from`."""

    strategy: str = named("la-lora", "the method", METHODS)
    num_rounds: int = at_least(1, 15, "communication rounds", kind=BUDGET)
    num_supernodes: int = at_least(1, 4, "sites the run waits for (virtual sites in a simulation)", kind=BUDGET)
    fraction_train: float = key(
        1.0, "share of the sites drawn each round", "a number in (0, 1]", lambda v: 0 < v <= 1, kind=BUDGET
    )
    max_failures: int = at_least(
        0, 1, "sites a round may lose before the run stops; a site whose budget is spent is not lost", kind=PERFORMANCE
    )
    min_sites: int = at_least(1, 1, "sites a round must merge; with fewer the run stops")
    round_seconds: int = at_least(
        0, 0, "seconds a round waits for real sites; whoever is later is lost to it (max-failures); 0: a day", kind=PERFORMANCE
    )
    trust: str = choice(
        "own-noise",
        "how sites reach the run's ε: own-noise: each adds all the noise it needs; secure-sum: the server sees the sites' sum "
        "only, and they share one noise (needs train.local-steps = 1)",
        "own-noise",
        "secure-sum",
    )
    colluders: int = at_least(0, 1, "sites that may side with the server without breaking ε under trust = secure-sum")
    evaluate_every: int = at_least(1, 1, "the server evaluates every N rounds, and after the last")
    evaluate_sites: bool = key(
        False,
        "sites also report the accuracy on their own records: in a simulation exact, a LEAK that no ε covers; real sites add "
        "noise and count it in their ledgers, if their owners allow it",
    )
    profiles: str = key(
        "",
        "what virtual sites say of themselves, in their order and then again from the first, with semicolons between, such as "
        "'rank=8;rank=2 layers=4 steps=5'; real sites have it in their node-config; empty: they do not differ",
    )
    seed: int = at_least(0, 0, "seed of the initial adapter, the partition and, in simulation only, of noise and sampling")
    output_dir: str = key("runs", "folder under which the run's own folder is made", kind=PLACE)
    run_name: str = key(
        "",
        "name of the run's folder; empty: strategy, ε, seed and time",
        f"a name of at most {LONGEST_NAME} bytes without slashes and control characters that does not start with a dot",
        lambda v: not v.startswith(".") and not {"/", "\\"} & set(v) and v.isprintable() and len(v.encode()) <= LONGEST_NAME,
        kind=PLACE,
    )
    resume: bool = key(
        False, "go on with the run of this run-name after its last checkpoint; all other keys must be the same", kind=PLACE
    )
    track: str = key(
        "",
        "who follows the run, with commas between several: tensorboard, wandb, mlflow, or another package's tracker; only the "
        "server looks at it",
        "names with commas between, each once",
        _each_once,
        kind=PLACE,
    )
    metrics_file: str = key(
        "", "file that the server keeps up to date for Prometheus, such as /var/lib/node_exporter/lalora.prom", kind=PLACE
    )
    model: ModelSettings = field(default_factory=ModelSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    data: DataSettings = field(default_factory=DataSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    privacy: PrivacySettings = field(default_factory=PrivacySettings)
    filter: FilterSettings = field(default_factory=FilterSettings)
    merge: MergeSettings = field(default_factory=MergeSettings)

    @property
    def before_training(self) -> str:
        """What the model is before the first round."""
        return "adapter it started from" if self.lora.start_from else "frozen model"

    def words_of(self, site: int) -> str:
        """What a virtual site says of itself."""
        words = self.profiles.split(";")
        return words[site % len(words)].strip()

    @property
    def kinds_of_sites(self) -> int:
        """How many virtual sites there are until their words begin again."""
        return min(self.num_supernodes, self.profiles.count(";") + 1)

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names of those who follow the run. No site knows all of them: a tracker is installed on the server alone."""
        return tuple(name.strip() for name in self.track.split(",") if name.strip())

    @property
    def private(self) -> bool:
        """Whether the run clips and adds noise (finite ε)."""
        return math.isfinite(self.privacy.epsilon)

    @property
    def task(self) -> str:
        """``image``, ``text`` (classification both) or ``language`` (modelling); follows from the settings alone."""
        if not self.model.name.startswith("hf/"):
            return "image"
        return "language" if self.data.response else "text"

    @property
    def sites_per_round(self) -> int:
        """Sites drawn each round."""
        return max(1, round(self.fraction_train * self.num_supernodes))

    def evaluates_after(self, server_round: int) -> bool:
        """Whether the model is evaluated after this round."""
        return server_round % self.evaluate_every == 0 or server_round == self.num_rounds

    @property
    def shares_noise(self) -> bool:
        """Whether sites share one noise, of which the server sees the sum only."""
        return self.trust == "secure-sum"

    @property
    def server_steps(self) -> bool:
        """Whether sites send gradients, and the optimizer is the server's."""
        return self.train.step_at == "server" or (self.train.step_at == "auto" and self.shares_noise)

    @property
    def ridge_first(self) -> bool:
        """Whether the first round releases a ridge head."""
        return self.lora.head == "ridge"

    @property
    def _all_rounds_per_site(self) -> int:
        if self.privacy.max_rounds:
            return self.privacy.max_rounds
        repeats = math.ceil(self.num_rounds / ROUNDS_A_REPEAT) + self.ridge_first if self.shares_noise else 0
        return self.num_rounds + repeats

    @property
    def ridge_rounds(self) -> int:
        """Most rounds any one site may serve for the ridge head: one, and another where that leaves room for other repeats."""
        return (2 if self._all_rounds_per_site > self.num_rounds + 1 else 1) if self.ridge_first else 0

    @property
    def rounds_per_site(self) -> int:
        """Most rounds any one site may serve, with repeats, without those for a ridge head; the noise is calibrated for them."""
        return self._all_rounds_per_site - self.ridge_rounds

    @property
    def steps_per_site(self) -> int:
        """Most noisy steps any one site may take in the run, that for a ridge head included."""
        return self.ridge_rounds + self.rounds_per_site * self.train.local_steps
