"""What does the cache on the server bring, and is it as much as the whole model's own cache brings?

SmolLM2-135M in float32, 100 new tokens, one thread a process, the two models in turns. Without a cache a
token costs what the whole text before it costs, so all 100 would take minutes: the 10 in the text's middle
are timed, whose mean cost is that of all. They must be the tokens that the run with the cache chose there.

The share of the whole model's gain that the split reaches is (split over whole, with the cache) over (split
over whole, without it), each the median of pairs measured one after the other.
"""

from __future__ import annotations

import statistics
from collections import defaultdict

from _common import markdown, median_ratio, serving, write
from _generation import NEW_TOKENS, Models, bundled_model, prompt, require_equal, tokens_per_s

PROMPTS = (16, 128, 512, 1024)
REPEATS = 5
TIMED_WITHOUT = 10
WANTED_SHARE, WANTED_AT_LONGEST = 0.9, 25


def measure(models: Models, length: int) -> dict[str, float]:
    ids = prompt(length)
    speeds: dict[str, list[float]] = defaultdict(list)
    for _ in range(REPEATS):
        for name in ("whole", "split"):
            speed, text = tokens_per_s(getattr(models, name), ids)
            speeds[f"{name}_cached"].append(speed)
            if name == "whole":
                expected = text
            require_equal(text, expected)
        start = length + (NEW_TOKENS - TIMED_WITHOUT) // 2
        for name in ("whole", "split"):
            speed, text = tokens_per_s(
                getattr(models, name), expected[:, :start], TIMED_WITHOUT, use_cache=False
            )
            speeds[f"{name}_uncached"].append(speed)
            require_equal(text, expected[:, : start + TIMED_WITHOUT])
    figures = {name: statistics.median(found) for name, found in speeds.items()}
    for name in ("whole", "split"):
        figures[f"{name}_gain"] = figures[f"{name}_cached"] / figures[f"{name}_uncached"]
    with_cache, without = (
        median_ratio(speeds[f"split_{how}"], speeds[f"whole_{how}"]) for how in ("cached", "uncached")
    )
    figures["share"] = with_cache / without
    print(length, figures, flush=True)
    return figures


def main() -> None:
    folder = bundled_model()
    with serving(folder) as server:
        models = Models.load(folder, server.address)
        tokens_per_s(models.split, prompt(16), 5)
        tokens_per_s(models.whole, prompt(16), 5)
        figures = {length: measure(models, length) for length in PROMPTS}
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
        for length, f in figures.items()
    ]
    header = (
        "prompt", "whole, tokens/s with / without", "split, tokens/s with / without", "whole's gain",
        "split's gain",
        f"split's gain over whole's (wanted {WANTED_SHARE}; and {WANTED_AT_LONGEST}x at {PROMPTS[-1]})",
    )  # fmt: skip
    write("kv_cache", {"new_tokens": NEW_TOKENS, "prompts": figures}, markdown(header, rows))


if __name__ == "__main__":
    main()
