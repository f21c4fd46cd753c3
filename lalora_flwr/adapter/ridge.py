"""A classification head by ridge regression on the frozen model's features (Mehta et al., TMLR 2023; arXiv 2402.18905).

What is trained are sums over records: of a feature vector with itself, and with the label. They are linear in the records, so one
release of them is all that the data are asked for, there is no learning rate, and how labels lie over the sites does not
matter. For a record with features x, less a centre that is public and scaled to norm 1, and a target y of norm 1

    gram  gets  √w x xᵀ      cross  gets  √(1 - w) y xᵀ        w = 1/2,

together a vector of norm 1, whose sign is turned and which is made so long that the clip scales every record's to the same length
C: it is then the gradient of a loss that is linear in ``gram`` and ``cross``, and goes the way of any gradient. The solution
depends on the ratio of the two only, so C, the learning rate, the number of steps and the batch matter for the noise alone.

One of the features is a constant, whose weight is the head's intercept: without it every class, however rare, would be said of
as many records as it is not. The constant is public, `CONSTANT` of the root of the mean squared norm of the public records'
centred features. It is there before x is scaled to norm 1, so a record's products are a vector of norm 1 with it as without it,
and the sensitivity is C.

A head without an intercept, as those of GPT-2 and Llama are, has no place for what centre and constant would come to: then
both are 0. Such a head is applied to every token, and the model takes the outputs of one; that token's features are the record's.

From the released sums G = sym(gram) / √w and R = cross / √(1 - w) the head is R V diag(1 / max(e, λ)) Vᵀ with the eigenvalues e
and eigenvectors V of G, and λ = s √(d / w) for d features, s being the standard deviation of the noise on an entry. It is
read off the released tensors: without noise gram is symmetric, so what is antisymmetric in it is noise alone. All of this
is post-processing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from lalora_flwr.adapter.form import Adapter, AdapterForm
from lalora_flwr.adapter.lora import refuse_batch_norm
from lalora_flwr.adapter.peft_folder import head_tensors
from lalora_flwr.adapter.saved import HEAD_FILE
from lalora_flwr.adapter.slots import Slot
from lalora_flwr.data.inputs import Inputs, to_device
from lalora_flwr.data.records import RecordSet
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.files import PUBLIC, replace_file
from lalora_flwr.models.base import BaseModel
from lalora_flwr.settings import LoraSettings, Settings
from lalora_flwr.tasks.regression import Regression

WEIGHT = 0.5  # w: of the features' own products
LENGTH = 100.0  # of a record's gradient before it is clipped, of all records the same; C may be as large
PUBLIC_AT_ONCE = 128  # records
SPREAD = 1.25  # root mean square of logits about their mean: of two classes at 0.92, or of ten at 0.87
MOST = 1000.0  # an entry of a head to start from; beyond 10,000 an adapter is not sane
TINY = 1e-12  # spread of a head that says nothing
CONSTANT = 0.25  # the constant feature, of the usual norm of the others; a larger one leaves less of x to them (docs/log.md)
LEAST = 1e-9  # of the largest eigenvalue: a floor where there is no noise
GRAM, CROSS, CENTRE = "gram", "cross", "centre"


class RidgeLayer(nn.Module):
    """Takes the place of the network's last linear layer. Features (n, in) to outputs (n, out), or (n, tokens, in) to
    (n, tokens, out), of which the network then takes one token's.

    Below, ``in`` is one more than the network's features: the last feature is 0, and that of the centre minus the constant.

    Attributes:
        gram: released products of features, (in, in).
        cross: released products of targets and features, (out, in).
        centre: mean features of public records, (in,); it does not train.
        head: the solution, (out, in).
        seen: the features that the last call got.
        marks: whether the first output is not the head's but the number of the token.
        intercept: whether the network's layer has one.
    """

    gram: nn.Parameter
    cross: nn.Parameter
    centre: nn.Parameter
    head: Tensor
    seen: Tensor
    marks = False

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        place, width = linear.weight.device, linear.in_features + 1
        self.gram = nn.Parameter(torch.zeros(width, width, device=place))
        self.cross = nn.Parameter(torch.zeros(linear.out_features, width, device=place))
        self.centre = nn.Parameter(torch.zeros(width, device=place), requires_grad=False)
        self.register_buffer("head", torch.zeros(linear.out_features, width, device=place), persistent=False)
        self.seen, self.intercept = torch.empty(0), linear.bias is not None

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() not in (2, 3):
            raise RuntimeError(
                f"its head takes {x.dim()}-dimensional features, and a ridge head those of records or of their tokens"
            )
        self.seen = nn.functional.pad(x.to(self.gram.dtype), (0, 1))
        outputs: Tensor = (self.seen - self.centre) @ self.head.T
        if self.marks and x.dim() == 3:
            outputs = torch.cat([self._numbers(x).expand(len(x), -1, 1), outputs[..., 1:]], dim=2)
        return outputs

    def _numbers(self, x: Tensor) -> Tensor:
        return torch.arange(x.shape[1], device=x.device, dtype=self.gram.dtype)[None, :, None]

    def choose(self, marks: Tensor) -> None:
        """Keep of each record's tokens the one whose outputs the network took; it is ``marks``, (n,), of a call with `marks`.

        Raises:
            RuntimeError: the network took no single token's.
        """
        if self.seen.dim() == 3:
            chosen = marks.long()
            if not torch.equal(chosen.to(marks.dtype), marks) or not bool(((chosen >= 0) & (chosen < self.seen.shape[1])).all()):
                raise RuntimeError("its outputs are not those of one token, and a ridge head takes one vector per record")
            self.seen = self.seen[torch.arange(len(chosen), device=chosen.device), chosen]

    def trained(self) -> tuple[Tensor, Tensor]:
        """``gram`` and ``cross``, with a first axis of records or of length 1."""
        return self.gram.unsqueeze(0), self.cross.unsqueeze(0)

    def losses(self, targets: Tensor) -> Tensor:
        """Of each record last seen, (n,): linear in what is trained, its gradient the record's products."""
        x = nn.functional.normalize(self.seen.detach() - self.centre, dim=1)
        gram, cross = self.trained()
        column = x.unsqueeze(2)  # (n, in, 1)
        own = WEIGHT**0.5 * (gram @ column).squeeze(2)  # (n, in)
        with_label = (1 - WEIGHT) ** 0.5 * (cross @ column).squeeze(2)  # (n, out)
        losses: Tensor = -LENGTH * ((own * x).sum(1) + (with_label * targets).sum(1))
        return losses

    @torch.no_grad()
    def solve(self) -> None:
        """Make the head of the sums that are now in ``gram`` and ``cross``."""
        self.head.copy_(solution(self.gram, self.cross))

    @torch.no_grad()
    def as_linear(self) -> nn.Linear:
        """The same outputs from the network's own features."""
        linear = nn.Linear(self.head.shape[1] - 1, len(self.head), bias=self.intercept)
        linear.weight.copy_(self.head[:, :-1])
        if self.intercept:
            linear.bias.copy_(-self.head @ self.centre)
        return linear


def solution(gram: Tensor, cross: Tensor) -> Tensor:
    """The head (out, in), float64, from released sums; zero if they are."""
    gram, cross = gram.detach().double(), cross.detach().double()
    width = len(gram)
    odd = torch.triu(gram - gram.T, diagonal=1)  # each entry is the difference of two draws of the noise
    noise = float(odd.square().sum() / max(1, width * (width - 1))) ** 0.5
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2 / WEIGHT**0.5)
    least = max(noise * (width / WEIGHT) ** 0.5, LEAST * float(values.abs().max()))
    if not least > 0:
        return torch.zeros_like(cross)
    head: Tensor = (cross / (1 - WEIGHT) ** 0.5 @ vectors) / values.clamp(min=least) @ vectors.T
    return head


class RidgeAdapter(Adapter):
    """A model with a `RidgeLayer`; loading the sums solves for the head."""

    def __init__(self, base: BaseModel, layer: RidgeLayer, path: str) -> None:
        self._base, self._layer, self._path = base, layer, path
        parts = {GRAM: layer.gram, CROSS: layer.cross, CENTRE: layer.centre}
        slots = {Slot(f"{path}.{part}", path, part, tuple(p.shape), frozen=part == CENTRE): p for part, p in parts.items()}
        super().__init__(base.module, slots)

    @torch.inference_mode()
    def prepared(self, base: BaseModel, public: RecordSet) -> dict[str, Tensor]:
        """Sums of zero around the mean features of the public records, whose labels are not looked at."""
        if not self._layer.intercept:
            return self.state()
        total, squares, count = torch.zeros_like(self._layer.centre, dtype=torch.float64), 0.0, 0
        for inputs in self._inputs(public):
            seen = self._look(base, inputs).double()
            total += seen.sum(0)
            squares += float(seen.square().sum())
            count += len(seen)
        centre = total / max(1, count)
        centre[-1] = -CONSTANT * max(0.0, squares / max(1, count) - float(centre.square().sum())) ** 0.5
        return {**self.state(), f"{self._path}.{CENTRE}": centre.float().cpu()}

    def _look(self, base: BaseModel, inputs: Inputs) -> Tensor:
        """The features of each record, (n, in)."""
        self._layer.marks = True
        try:
            self._layer.choose(base.logits(self.model, inputs)[:, 0])
        finally:
            self._layer.marks = False
        return self._layer.seen

    def _inputs(self, public: RecordSet) -> Iterator[Inputs]:
        """Of public records, some at once."""
        self.model.eval()
        for part in public.parts(torch.arange(len(public)), PUBLIC_AT_ONCE):
            inputs, labels = public.batch(part)
            if len(labels):
                yield to_device(inputs, self.device)

    def as_linear(self) -> dict[str, Tensor]:
        """The loaded head as the tensors of the linear layer that it stands for, by their names in the base model."""
        return {f"{self._path}.{name}": value for name, value in self._layer.as_linear().state_dict().items()}

    @torch.inference_mode()
    def as_start(self, base: BaseModel, public: RecordSet) -> dict[str, Tensor]:
        """As `as_linear`, for a cross-entropy to go on from.

        The head's outputs estimate targets of norm 1, which as logits would call every class about as likely. They are scaled
        until those of the public records, whose labels are not looked at, deviate from a record's mean by `SPREAD`, or an entry
        is `MOST`: features that are nearly the same for every record would ask for any size.
        """
        total, count = 0.0, 0
        for inputs in self._inputs(public):
            logits = base.logits(self.model, inputs).double()
            total += float((logits - logits.mean(1, keepdim=True)).square().sum())
            count += logits.numel()
        scale, head = SPREAD / max((total / max(1, count)) ** 0.5, TINY), self.as_linear()
        scale = min(scale, MOST / max(TINY, *(float(value.abs().max()) for value in head.values())))
        return {name: value * scale for name, value in head.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        super().load(state)
        self._layer.solve()

    def losses(self, base: BaseModel, inputs: Inputs, labels: Tensor) -> Tensor:
        self._look(base, inputs)
        return self._layer.losses(base.problem.directions(labels, base.num_classes).to(self._layer.gram.dtype))

    @torch.no_grad()
    def stir(self, generator: torch.Generator) -> None:
        """Nothing: the gradients are the same wherever the sums are."""

    def save(self, folder: Path) -> None:
        """The sums, and the head as stock layers: ``head.safetensors`` holds the tensors of the network's own head."""
        super().save(folder)
        own = f"{self._path}."
        tensors = {name: value for name, value in head_tensors(self._base).items() if not name.startswith(own)}
        tensors |= self.as_linear()
        if self._base.published.inside:  # the model elsewhere has no head, and the card applies this one
            tensors = {name.removeprefix(f"{self._base.head}."): value for name, value in tensors.items()}
        replace_file(folder / HEAD_FILE, save(tensors), mode=PUBLIC)
        self._base.save_config(folder)

    def loading(self) -> list[str]:
        lines = ["from pathlib import Path", "from safetensors.torch import load_file", 'adapter = "."  # this folder']
        lines += [*self._base.published.loading, "model = base.float().eval()"]
        if not self._base.published.inside:
            lines.append(f'model.load_state_dict(load_file(Path(adapter) / "{HEAD_FILE}"), strict=False)')
        return lines


class RidgeHead(AdapterForm):
    """The network with its last linear layer replaced by a `RidgeLayer`; nothing is drawn."""

    parts = frozenset({GRAM, CROSS, CENTRE})

    def check(self, name: str, settings: Settings) -> None:
        super().check(name, settings)
        if settings.strategy != "ridge-head":
            raise ConfigError(f"lora.form = {name!r}: needs a method of its own; set strategy = 'ridge-head'")

    def attach(self, base: BaseModel, settings: LoraSettings, seed: int) -> RidgeAdapter:
        """As `AdapterForm.attach`.

        Raises:
            ConfigError: there is no classification head with a linear layer, it predicts numbers, or the model has BatchNorm.
        """
        refuse_batch_norm(base)
        if isinstance(base.problem, Regression):
            raise ConfigError(
                "strategy = 'ridge-head': predicts classes; choose another strategy for data.problem-type = 'regression'"
            )
        own = [name for name, module in base.module.named_modules() if isinstance(module, nn.Linear) and _inside(name, base.head)]
        if not own:
            raise ConfigError(f"strategy = 'ridge-head': {base.name} has no classification head with a linear layer")
        path = own[-1]
        parent, _, name = path.rpartition(".")
        linear = base.module.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        layer = RidgeLayer(linear)
        setattr(base.module.get_submodule(parent), name, layer)
        return RidgeAdapter(base, layer, path)


def _inside(name: str, head: str) -> bool:
    return bool(head) and (name == head or name.startswith(head + "."))


RIDGE_HEAD = RidgeHead()
