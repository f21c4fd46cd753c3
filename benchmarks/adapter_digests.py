"""SHA-256 of the adapters of eight small runs: equal before and after a change that is to change nothing.

    python -m benchmarks.adapter_digests [--engine inline|ray]

Four methods, head frozen and trained; three sites of which two are drawn, three rounds of four steps. The runs go through the
command line alone. To look at another commit: ``PYTHONPATH=CHECKOUT python benchmarks/adapter_digests.py``. Digests are those of
one kind of processor: compare two commits on one machine.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

COMMAND = "import sys; from lalora_flwr.cli.main import main; main()"
RUN = "num-rounds=3 num-supernodes=3 fraction-train=0.67 train.local-steps=4"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="inline", choices=("inline", "ray"))
    engine = parser.parse_args().engine
    with tempfile.TemporaryDirectory() as folder:
        for method in ("la-lora", "dp-lora", "ffa-lora", "rolora"):
            for head in ("frozen", "trained"):
                values = f"strategy={method} lora.head={head} {RUN} output-dir={folder} run-name={method}-{head}"
                arguments = [sys.executable, "-c", COMMAND, "run", "--engine", engine, "-c", values]
                subprocess.run(arguments, check=True, capture_output=True)
                adapter = Path(folder) / f"{method}-{head}" / "adapter" / "adapter_model.safetensors"
                print(f"{hashlib.sha256(adapter.read_bytes()).hexdigest()}  {method}, head {head}", flush=True)


if __name__ == "__main__":
    main()
