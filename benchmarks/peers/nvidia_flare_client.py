"""A site's script in NVFlare's simulator."""

from __future__ import annotations

import os

import nvflare.client as flare
import torch
from nvflare.app_common.abstract.fl_model import FLModel

from benchmarks.job import JOB, Job, LocalTraining


def main() -> None:
    torch.set_num_threads(1)
    flare.init()
    training = LocalTraining(Job.of(os.environ[JOB]))
    site = int(flare.get_site_name().removeprefix("site-")) - 1
    while flare.is_running():
        received = flare.receive()
        training.adapter.load({name: torch.as_tensor(value) for name, value in received.params.items()})
        training.train(received.current_round, site)
        flare.send(FLModel(params={name: value.numpy() for name, value in training.adapter.state().items()}))


if __name__ == "__main__":
    main()
