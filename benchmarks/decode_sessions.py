"""How many tokens a second do several clients get at once, measured against the whole model's one batch?

SmolLM2-135M, 64 new tokens after 16. Each client is a process with one thread that runs the library's
`generate` over the wire, the server is another with one thread; the whole model runs in turns with them, on
one thread, with as many rows in one batch. Each round gives a ratio; medians are shown.
"""

from __future__ import annotations

from dataclasses import asdict

from _common import RESULTS, markdown, serving, write

from splitlearn.bench.machine import circumstances
from splitlearn.bench.picture import draw
from splitlearn.bench.texts import TextFigures, Texts, write_texts, writers
from splitlearn.cli.demo_model import bundled_model

TEXTS = Texts(sessions=(1, 2, 4, 8), prompt_tokens=16, new_tokens=64, rounds=3)
WANTED = {4: 0.7}
PETALS = "For comparison, measured on a machine of this kind: Petals with 4 clients, 0.33 of the whole batch."
HEADER = (
    "clients at once",
    "tokens/s together",
    "each",
    "p50 / p99 of a token, ms",
    "whole, one batch of as many rows",
    "whole, one row",
    "together / whole batch",
    "wanted",
)


def cells(figures: TextFigures) -> tuple[object, ...]:
    return (
        figures.sessions,
        f"{figures.tokens_per_s:.1f}",
        f"{figures.tokens_per_s_each:.1f}",
        f"{figures.latency.p50_ms:.0f} / {figures.latency.p99_ms:.0f}",
        f"{figures.whole_tokens_per_s:.1f}",
        f"{figures.whole_alone_tokens_per_s:.1f}",
        f"{figures.ratio:.2f}",
        WANTED.get(figures.sessions, ""),
    )


def main() -> None:
    folder = str(bundled_model())
    with (
        serving(bundled_model()) as server,
        writers(folder, server.address, max(TEXTS.sessions), dtype="auto", codec="raw", whole=True) as by,
    ):
        figures = list(write_texts(by, TEXTS))
    busy = circumstances()["busy"]
    table = markdown(HEADER, [cells(each) for each in figures])
    table += f"\n\nProcesses that wanted a processor in the last minute: {busy}."
    table += f"\n{PETALS}"
    report = {"rows": [asdict(each) for each in figures], "busy": busy}
    write("decode_sessions", report, table)
    draw({"question": "decode", "model": folder} | report, RESULTS / "decode_sessions.png")


if __name__ == "__main__":
    main()
