"""Can a server that knows the bottom's weights read the text out of the activations?

Of a public model it does. Each activation depends on its token and those before it, so the server can try
every entry of the vocabulary at each place, in order, and keep the one whose activation is nearest to what
was sent. SmolLM2-135M, k = 2; the activations as they are sent in float32, in bfloat16, and with Gaussian
noise of a share of each channel's standard deviation (which costs the model quality).
"""

from __future__ import annotations

import torch
from _common import markdown, write
from _generation import bundled_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

BOTTOM_LAYERS = 2
BATCH = 2048
TEXT = "The patient was admitted on Tuesday with chest pain and shortness of breath."
CASES = ("float32", "bfloat16", "noise 0.1", "noise 1.0")


def bottom_of(folder: object) -> torch.nn.Module:
    """What the server can load itself: embeddings and the first layers of the public checkpoint."""
    base = AutoModelForCausalLM.from_pretrained(folder).eval().model
    base.layers = base.layers[:BOTTOM_LAYERS]
    base.config.num_hidden_layers = BOTTOM_LAYERS
    base.norm = torch.nn.Identity()
    return base


def as_sent(activation_TD: Tensor, case: str) -> Tensor:
    if case == "bfloat16":
        return activation_TD.bfloat16().float()
    if case.startswith("noise"):
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(activation_TD.shape, generator=generator)
        return activation_TD + float(case.split()[1]) * activation_TD.std(dim=0) * noise
    return activation_TD


def search(bottom: torch.nn.Module, sent_TD: Tensor, vocabulary: int) -> list[int]:
    """The text, place by place: the entry whose activation lies nearest."""
    found: list[int] = []
    for wanted_D in sent_TD:
        distances = []
        for entries in torch.arange(vocabulary).split(BATCH):
            cache = DynamicCache(config=bottom.config)
            if found:
                bottom(torch.tensor([found]), past_key_values=cache, use_cache=True)
                cache.batch_repeat_interleave(len(entries))
            activation_ND = bottom(entries[:, None], past_key_values=cache, use_cache=True).last_hidden_state[
                :, 0
            ]
            distances.append((activation_ND - wanted_D).norm(dim=1))
        found.append(int(torch.cat(distances).argmin()))
    return found


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    folder = bundled_model()
    tokenizer, bottom = AutoTokenizer.from_pretrained(folder), bottom_of(folder)
    ids = tokenizer(TEXT).input_ids
    activation_TD = bottom(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
    figures = {}
    for case in CASES:
        found = search(bottom, as_sent(activation_TD, case), len(tokenizer))
        right = sum(a == b for a, b in zip(found, ids, strict=True)) / len(ids)
        figures[case] = {"recovered": right, "text": tokenizer.decode(found)}
        print(case, figures[case], flush=True)
    rows = [
        (case, f"{100 * f['recovered']:.0f} %", f["text"].replace("\n", " ")) for case, f in figures.items()
    ]
    header = (f"as sent (k = {BOTTOM_LAYERS})", "tokens recovered", "what the server reads")
    write("token_search", {"text": TEXT, "tokens": len(ids), "cases": figures}, markdown(header, rows))


if __name__ == "__main__":
    main()
