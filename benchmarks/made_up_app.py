"""The ClientApp of Ray's workers in `benchmarks.simulation`: made-up records."""

import os
from functools import cache

from benchmarks.job import JOB, Job
from benchmarks.loops import records_of
from lalora_flwr.site.app import make_client_app
from lalora_flwr.site.host import Host


@cache
def host() -> Host:
    return Host(simulated=True, records=records_of(Job.of(os.environ[JOB])))


app = make_client_app(host)
