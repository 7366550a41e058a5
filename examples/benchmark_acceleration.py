"""What a trunk's options are worth under load: steps a second and latency, option by option.

    python examples/benchmark_acceleration.py
    python examples/benchmark_acceleration.py --model DIR --sessions 20 --seconds 10

The first line takes the bundled model. For each set of options a server is started in this process, and
another process puts a load of many sessions on it. What an option is worth depends on machine and model, so
the table of your own machine is the one that counts; run it twice to see how much of it is noise.
"""

import argparse
import sys

import torch

from splitlearn import TrunkServer
from splitlearn.bench.load import Load, LoadFigures, put_load
from splitlearn.cli.demo_model import bundled_model

OPTIONS = {
    "as it is": {},
    "one step at a time": {"batching": {"max_batch_rows": 1}},
    "4 rows a batch": {"batching": {"max_batch_rows": 4}},
    "waits 2 ms for company": {"batching": {"wait_ms": 2.0}},
}


def measure(model: str, load: Load, options: dict) -> LoadFigures:
    sessions = {"session_tokens": load.text_tokens}
    with TrunkServer(model, port=0, sessions=sessions, **options) as server:
        return put_load(server.address, load)


def print_row(name: str, figures: LoadFigures) -> None:
    latency = figures.latency
    print(
        f"{name:<24}{figures.steps_per_s:>10.1f}{figures.steps_per_batch:>10.1f}"
        f"{latency.p50_ms:>10.1f}{latency.p99_ms:>10.1f}{figures.failed:>8}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or hub id; the bundled SmolLM2-135M-Instruct by default")
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=1, help="threads of the trunk's computation")
    asked = parser.parse_args()

    torch.set_num_threads(asked.threads)
    model = str(asked.model or bundled_model())
    load = Load(asked.sessions, asked.seconds, prompt_tokens=8, text_tokens=128)

    print(f"{'options':<24}{'steps/s':>10}{'a batch':>10}{'p50 ms':>10}{'p99 ms':>10}{'failed':>8}")
    failed = 0
    for name, options in OPTIONS.items():
        figures = measure(model, load, options)
        print_row(name, figures)
        failed += figures.failed
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
