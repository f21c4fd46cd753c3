"""What a site does when asked to evaluate the shared model on its own records. Off unless run and site both allow it."""

from __future__ import annotations

import torch
from flwr.app import Context, MetricRecord, RecordDict

from lalora_flwr import site
from lalora_flwr.adapted import adapted_model
from lalora_flwr.errors import SiteRefusal
from lalora_flwr.evaluation import evaluate
from lalora_flwr.lora.adapter import load_adapter_state
from lalora_flwr.messages import ARRAYS, CONFIG, SITE_METRICS, to_tensors


def evaluate_on_site(content: RecordDict, context: Context) -> RecordDict:
    """Accuracy and loss of the server's adapter on the site's private records.

    Guarantee: none. The reply is an exact statistic of private records, which no ε covers; a run asks for it with
    ``evaluate-sites`` and a real site answers only if its node-config says ``allow-evaluation``.

    Raises:
        SiteRefusal: with a fixed reason, if the site will not evaluate.
    """
    settings = site.site_settings(context)
    allowed = site.in_simulation() or str(context.node_config.get("allow-evaluation", "")).lower() == "true"
    if not (settings.evaluate_sites and allowed):
        raise SiteRefusal("evaluation: not allowed by the site's node-config (allow-evaluation)")
    torch.set_num_threads(settings.train.num_threads)
    adapted = adapted_model(settings, str(context.node_config.get("device", "")))
    if adapted.base.provenance.digest != content[CONFIG]["model-digest"]:
        raise SiteRefusal("model: the site's base model differs from the server's; use the same files and package versions")
    load_adapter_state(adapted.model, {**adapted.initial, **to_tensors(content[ARRAYS])})  # type: ignore[arg-type]
    quality = evaluate(adapted, site.load_records(settings, context.node_config, adapted.base))
    return RecordDict({SITE_METRICS: MetricRecord({"accuracy": quality["accuracy"], "loss": quality["loss"]})})
