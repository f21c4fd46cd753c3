"""What others need to load a base model without this package."""

from __future__ import annotations

from dataclasses import dataclass

SEQ_CLS, CAUSAL_LM, FEATURE_EXTRACTION = "SEQ_CLS", "CAUSAL_LM", "FEATURE_EXTRACTION"  # PEFT's names of tasks


@dataclass(frozen=True)
class Published:
    """How a base model is called and loaded elsewhere.

    Attributes:
        name: of the repository on the hub, or the absolute path of a folder; empty if it is neither.
        task_type: PEFT's name of the task; empty for models outside transformers.
        loading: lines of Python that make ``base``, the frozen model with a head for the run's classes.
        license: of the weights, as their publisher writes it; empty if that is not known.
        inside: the part of the network's names that a published model has not: that of a wrapper of this package.
    """

    name: str = ""
    task_type: str = ""
    loading: tuple[str, ...] = ()
    license: str = ""
    inside: str = ""
