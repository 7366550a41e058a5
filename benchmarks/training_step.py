"""What does a split LoRA step cost beside the whole model's step?

SmolLM2-135M in float32, LoRA r=8 on all linear layers, batch 4 x 128, client and server as two processes with
one thread each, the whole model in a process with one thread, in turns. A step is forward, backward, clipping
and the optimizers. The losses must be equal.
"""

from __future__ import annotations

import statistics

import torch
from _common import markdown, median_ratio, serving, write
from _generation import bundled_model
from _training import Trained, batch, lora

ROWS, TOKENS = 4, 128
WARM_UP, PAIRS = 1, 8
WANTED = 1.10
CLOSE = 1e-5


def main() -> None:
    torch.set_num_threads(1)
    folder = bundled_model()
    with serving(folder) as server:
        whole = Trained.whole(folder, lora())
        split = Trained.split(folder, server.address, lora())
        seconds: dict[str, list[float]] = {"whole": [], "split": []}
        for number in range(WARM_UP + PAIRS):
            ids = batch(ROWS, TOKENS, seed=number)
            (whole_loss, whole_s), (split_loss, split_s) = whole.step(ids), split.step(ids)
            if abs(whole_loss - split_loss) > CLOSE * whole_loss:
                raise SystemExit(f"step {number}: loss {split_loss} split, {whole_loss} whole")
            print(number, f"{whole_loss:.6f} {whole_s:.2f} {split_s:.2f}", flush=True)
            if number >= WARM_UP:
                seconds["whole"].append(whole_s)
                seconds["split"].append(split_s)
        sent = split.model.trunk.transport.traffic.tensor_bytes / (WARM_UP + PAIRS)
        split.model.close()
    ratio = median_ratio(seconds["split"], seconds["whole"])
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    rows = [
        ("whole, s a step", f"{medians['whole']:.2f}"),
        ("split, s a step", f"{medians['split']:.2f}"),
        (f"split over whole, median of {PAIRS} pairs (wanted <= {WANTED})", f"{ratio:.3f}"),
        ("tensor bytes a step, both ways", f"{sent / 1e6:.2f} MB"),
    ]
    figures = {"ratio": ratio, "seconds": seconds, "tensor_bytes_a_step": sent}
    write("training_step", figures, markdown(("batch 4 x 128, float32", "figure"), rows))


if __name__ == "__main__":
    main()
