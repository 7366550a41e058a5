"""How fast does the split model generate, measured against the whole model's generate?

SmolLM2-135M in float32, 100 new tokens; client and server are two processes with one thread each, the whole
model has one thread. The two run one after the other, in turns, and each pair gives a ratio.
"""

from __future__ import annotations

import statistics

from _common import markdown, median_ratio, serving, write
from _generation import Models, bundled_model, prompt, require_equal, tokens_per_s

PROMPTS = (16, 256)
PAIRS = 4
WANTED = 0.90


def compare(models: Models, length: int) -> dict[str, object]:
    ids = prompt(length)
    whole, split = [], []
    for turn in range(PAIRS + 1):
        speed_whole, made_whole = tokens_per_s(models.whole, ids)
        speed_split, made_split = tokens_per_s(models.split, ids)
        require_equal(made_split, made_whole)
        if turn:  # the first pair warms both up
            whole.append(speed_whole)
            split.append(speed_split)
    return {
        "whole_tokens_per_s": whole,
        "split_tokens_per_s": split,
        "median_ratio": median_ratio(split, whole),
        "ratios": [a / b for a, b in zip(split, whole, strict=True)],
    }


def main() -> None:
    folder = bundled_model()
    with serving(folder) as server:
        models = Models.load(folder, server.address)
        figures = {length: compare(models, length) for length in PROMPTS}
        models.split.close()
    rows = [
        (
            length,
            f"{statistics.median(f['whole_tokens_per_s']):.1f}",
            f"{statistics.median(f['split_tokens_per_s']):.1f}",
            f"{f['median_ratio']:.3f}",
            f"{min(f['ratios']):.2f} to {max(f['ratios']):.2f}",
        )
        for length, f in figures.items()
    ]
    header = (
        "prompt",
        "whole, tokens/s",
        "split, tokens/s",
        f"median of {PAIRS} paired ratios (wanted {WANTED})",
        "range",
    )
    write("split_vs_whole", figures, markdown(header, rows))


if __name__ == "__main__":
    main()
