import pytest

from splitlearn.cli.sizes import parse_bytes, show_bytes


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("2GiB", 2 << 30),
        ("512MiB", 512 << 20),
        ("1.5 GiB", 3 << 29),
        ("64kib", 64 << 10),
        ("2GB", 2 * 10**9),
        ("3M", 3 * 10**6),
        ("1000", 1000),
        ("1000B", 1000),
        (" 1TiB ", 1 << 40),
    ],
)
def test_sizes_are_read_as_people_write_them(written, size):
    assert parse_bytes(written) == size


@pytest.mark.parametrize("written", ["", "much", "-1", "0", "2XB", "GiB", "1,5GB", "1e9", "0.1"])
def test_what_is_no_size_is_refused_with_an_example(written):
    with pytest.raises(ValueError, match="2GiB"):
        parse_bytes(written)


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (4608, "4.61 kB"),
        (30_200_000, "30.2 MB"),
        (538_000_000, "538 MB"),
        (999_900, "1 MB"),
        (2.5e12, "2.5 TB"),
    ],
)
def test_sizes_are_shown_with_three_digits(size, shown):
    assert show_bytes(size) == shown
