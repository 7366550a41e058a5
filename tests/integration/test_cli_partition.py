"""partition, as its user runs it: what it writes, shows and refuses."""

import importlib.util
import json
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from splitlearn.cli.holdings_columns import ROOM
from splitlearn.cli.holdings_picture import ROWS_WITH_TEXT
from splitlearn.cli.partition import PICTURE
from splitlearn.disk import digest
from splitlearn.training.lines import read_examples

TOPICS = ["billing", "delivery", "returns"]
SETTINGS = ["--clients", 4, "--scheme", "dirichlet", "--alpha", 0.3, "--held-out", 0.1]


def line(number: int, **more: object) -> str:
    return json.dumps({"text": f"Complaint é {number}", "label": TOPICS[number % 3]} | more)


@pytest.fixture
def file(tmp_path) -> Path:
    """Lines that a program would write otherwise: spaces, other line ends, other fields, one twice."""
    path = tmp_path / "complaints.jsonl"
    rows = [line(number, site=number % 15) for number in range(117)]
    rows += ['{ "label":"returns",  "text":"\u00e9"}', rows[0], line(1, price="$5-$10") + "\r"]
    path.write_bytes(("\n\n".join(rows)).encode())
    return path


def lines_of(path: Path) -> list[bytes]:
    return [row for row in path.read_bytes().split(b"\n") if row.strip()]


def run(splitlearn_here, *words: object):
    done = splitlearn_here("partition", *words)
    assert done.returncode == 0, done.stderr
    return done


def refused(splitlearn_here, *words: object) -> str:
    done = splitlearn_here("partition", *words)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


def test_each_line_is_in_one_file_as_it_stands(splitlearn_here, file, tmp_path):
    out = tmp_path / "out"
    run(splitlearn_here, file, *SETTINGS, "--output", out)
    names = [f"client-0{n}.jsonl" for n in (1, 2, 3, 4)]
    assert {path.name for path in out.iterdir()} >= {*names, "held-out.jsonl", "partition.json"}
    held = [each for path in sorted(out.glob("*.jsonl")) for each in lines_of(path)]
    assert Counter(held) == Counter(lines_of(file))
    assert len(lines_of(out / "held-out.jsonl")) == 12
    assert all(read_examples(out / name) for name in names)


def test_the_record_says_who_holds_what_and_how_it_was_done(splitlearn_here, file, tmp_path):
    out = tmp_path / "out"
    told = json.loads(run(splitlearn_here, file, *SETTINGS, "--output", out, "--json").stdout)
    assert told == json.loads((out / "partition.json").read_text(encoding="utf-8"))
    assert told["settings"] == {
        "clients": 4,
        "scheme": "dirichlet",
        "by": "label",
        "alpha": 0.3,
        "min_examples": 2,
        "held_out": 0.1,
        "seed": 0,
    }
    assert (told["file"], told["xxh3"], told["examples"]) == (file.name, digest(file), 120)
    for holding in told["holdings"]:
        rows = [json.loads(row) for row in lines_of(out / holding["file"])]
        assert holding["classes"] == Counter(row["label"] for row in rows)
        assert holding["examples"] == len(rows)


def test_the_same_seed_gives_the_same_files_and_another_one_others(splitlearn_here, file, tmp_path):
    texts = []
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        run(splitlearn_here, file, *SETTINGS, "--seed", seed, "--output", tmp_path / name)
        texts.append([path.read_bytes() for path in sorted((tmp_path / name).glob("*.jsonl"))])
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    "words",
    [
        ["--clients", 3],
        ["--clients", 3, "--scheme", "shard", "--shards-each", 1],
        ["--clients", 3, "--scheme", "field"],
        ["--clients", 5, "--scheme", "shard", "--by", "length"],
    ],
)
def test_the_table_has_a_row_for_each_file(splitlearn_here, file, tmp_path, words):
    out = tmp_path / "out"
    shown = run(splitlearn_here, file, *words, "--output", out).stdout.splitlines()
    rows = {row.split()[0]: int(row.split()[1]) for row in shown if row.split()[0].startswith("client")}
    assert rows == {path.stem: len(lines_of(path)) for path in sorted(out.glob("*.jsonl"))}
    assert shown[-1] == f"{out}: 120 examples in {words[1]} files"


def test_with_field_alone_each_value_is_a_client(splitlearn_here, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(splitlearn_here, file, "--scheme", "field")
    for topic, path in zip(TOPICS, sorted(Path("complaints-partition").glob("*.jsonl")), strict=True):
        assert {json.loads(row)["label"] for row in lines_of(path)} == {topic}


def test_a_folder_with_something_in_it_stays_as_it_is(splitlearn_here, file, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    told = refused(splitlearn_here, file, "--clients", 2, "--output", tmp_path / "out")
    assert "name a new folder, or remove it first" in told
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ([], "give --clients N"),
        (["--clients", 2, "--scheme", "dirichlet"], "needs an --alpha"),
        (["--clients", 2, "--alpha", 1], "leave it out, or take --scheme dirichlet"),
        (["--clients", 2, "--scheme", "shard", "--by", "topic"], "`length`, which needs none"),
        (["--clients", 2, "--scheme", "shard", "--by", "site"], ":235: the line has no `site`"),
        (["--clients", 200], "name fewer clients"),
        (["--clients", 0], "greater than or equal to 1"),
        (["--clients", 2, "--held-out", 1], "held_out = 1.0"),
    ],
)
def test_what_cannot_be_done_says_what_to_do_and_writes_nothing(
    splitlearn_here, file, tmp_path, words, advice
):
    assert advice in refused(splitlearn_here, file, *words, "--output", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_where_all_have_the_same_value_nothing_can_differ(splitlearn_here, tmp_path):
    file = tmp_path / "one.jsonl"
    file.write_text("\n".join(line(number * 3) for number in range(9)))
    told = refused(splitlearn_here, file, "--clients", 2, "--scheme", "shard", "--output", tmp_path / "out")
    assert "name another field with --by, or take --scheme iid" in told


def test_a_plain_text_is_refused(splitlearn_here, tmp_path):
    (tmp_path / "notes.txt").write_text("All of it.")
    assert "as .jsonl" in refused(splitlearn_here, tmp_path / "notes.txt", "--clients", 2)


def test_an_unknown_scheme_is_wrong_use(splitlearn_here, file):
    assert splitlearn_here("partition", file, "--clients", 2, "--scheme", "fair").returncode == 2


def test_without_matplotlib_there_are_the_data_and_a_line_that_says_what_to_install(
    splitlearn_here, file, tmp_path, monkeypatch
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    done = run(splitlearn_here, file, "--clients", 2, "--output", tmp_path / "out")
    assert "pip install 'splitlearn[bench]'" in done.stderr
    assert not (tmp_path / "out" / PICTURE).exists()
    assert (tmp_path / "out" / "client-02.jsonl").exists()


HOSTILE = ["$5-$10", "_hidden", "[red]x[/red]", "a\nb", "\x1b[31m", "w" * 200, "$\\frac{", "名"]


@pytest.mark.parametrize(
    ("labels", "clients"),
    [(TOPICS, 1), (TOPICS, 12), (HOSTILE, 3), ([f"site {n}" for n in range(40)], 4), (TOPICS, 120)],
    ids=["one", "twelve", "hostile", "many classes", "many clients"],
)
@pytest.mark.filterwarnings("ignore:Glyph")
def test_in_the_picture_no_text_lies_on_another(splitlearn_here, tmp_path, monkeypatch, labels, clients):
    from matplotlib.text import Text

    boxes, write = {}, Text.draw

    def noted(text, renderer, *args, **how):
        if text.get_visible() and text.get_text():
            boxes[id(text)] = (text.get_text(), text.get_window_extent(renderer), text.figure.bbox)
        write(text, renderer, *args, **how)

    monkeypatch.setattr(Text, "draw", noted)
    file = tmp_path / "lines.jsonl"
    rows = [json.dumps({"text": "A line.", "label": labels[n * n % len(labels)]}) for n in range(3000)]
    file.write_text("\n".join(rows), encoding="utf-8")
    how = ["--scheme", "dirichlet", "--alpha", 0.3]
    done = run(splitlearn_here, file, "--clients", clients, *how, "--output", tmp_path / "out")
    assert "\x1b" not in done.stdout
    assert (tmp_path / "out" / PICTURE).read_bytes().startswith(b"\x89PNG")

    written = list(boxes.values())
    told = {text for text, _, _ in written}
    assert {"examples", "client-01" if clients <= ROWS_WITH_TEXT else "120 files"} <= told
    classes = {json.loads(row)["label"] for row in rows}
    assert any("others" in text for text in told) == (len(classes) > ROOM)
    overlaps = [(one, other) for (one, a, _), (other, b, _) in combinations(written, 2) if a.overlaps(b)]
    assert not overlaps
    beyond = [
        t
        for t, box, page in written
        if not (0 <= box.x0 < box.x1 <= page.x1 and 0 <= box.y0 < box.y1 <= page.y1)
    ]
    assert not beyond
