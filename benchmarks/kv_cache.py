"""What does the cache on the server bring, and is it as much as the whole model's own cache brings?

SmolLM2-135M in float32, 100 new tokens, one thread a process. Runs without a cache take minutes each and vary
little, so they run once; runs with it several times, in turns with the whole model's. `--prompts 1024`
measures that prompt again and keeps what the results file says of the others.
"""

from __future__ import annotations

import argparse
import json
import statistics

from _common import RESULTS, markdown, serving, write
from _generation import NEW_TOKENS, Models, bundled_model, prompt, require_equal, tokens_per_s

PROMPTS = (16, 128, 512, 1024)
REPEATS = 3
WANTED_SHARE, WANTED_AT_LONGEST = 0.9, 25


def measure(models: Models, length: int) -> dict[str, float]:
    ids = prompt(length)
    with_cache: dict[str, list[float]] = {"whole": [], "split": []}
    for _ in range(REPEATS):
        for name in with_cache:
            speed, made = tokens_per_s(getattr(models, name), ids)
            with_cache[name].append(speed)
            if name == "whole":
                expected = made
            else:
                require_equal(made, expected)
    without: dict[str, float] = {}
    for name in with_cache:
        without[name], made = tokens_per_s(getattr(models, name), ids, use_cache=False)
        require_equal(made, expected)
    figures = {f"{name}_cached": statistics.median(speeds) for name, speeds in with_cache.items()}
    figures |= {f"{name}_uncached": speed for name, speed in without.items()}
    for name in with_cache:
        figures[f"{name}_gain"] = figures[f"{name}_cached"] / figures[f"{name}_uncached"]
    figures["share"] = figures["split_gain"] / figures["whole_gain"]
    print(length, figures, flush=True)
    return figures


def measured_before() -> dict[int, dict[str, float]]:
    """What an earlier run found at other prompts: all of them together take half an hour."""
    file = RESULTS / "kv_cache.json"
    told = json.loads(file.read_text())["figures"]["prompts"] if file.exists() else {}
    return {int(length): figures for length, figures in told.items()}


def main(prompts: tuple[int, ...]) -> None:
    folder = bundled_model()
    with serving(folder) as server:
        models = Models.load(folder, server.address)
        tokens_per_s(models.split, prompt(16), 5)
        tokens_per_s(models.whole, prompt(16), 5)
        figures = measured_before() | {length: measure(models, length) for length in prompts}
        models.split.close()
    rows = [
        (
            length,
            f"{f['whole_cached']:.2f} / {f['whole_uncached']:.2f}",
            f"{f['split_cached']:.2f} / {f['split_uncached']:.2f}",
            f"{f['whole_gain']:.1f}",
            f"{f['split_gain']:.1f}",
            f"{f['share']:.2f}",
        )
        for length, f in sorted(figures.items())
    ]
    header = (
        "prompt", "whole, tokens/s with / without", "split, tokens/s with / without", "whole's gain",
        "split's gain",
        f"split's gain over whole's (wanted {WANTED_SHARE}; and {WANTED_AT_LONGEST}x at {PROMPTS[-1]})",
    )  # fmt: skip
    write("kv_cache", {"new_tokens": NEW_TOKENS, "prompts": figures}, markdown(header, rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, nargs="+", default=PROMPTS)
    main(tuple(parser.parse_args().prompts))
