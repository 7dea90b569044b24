"""The draw: uniform, repeatable, nested, and it opens few records."""

from collections import Counter

import pytest

from nsc_fast.data.sample import draw


def rows(n):
    return ((i, i) for i in range(n))


def test_the_seed_alone_fixes_rows_and_order():
    # Python guarantees this generator's numbers for ever, so these rows are the same on every machine.
    assert draw(rows(1000), lambda _, r: r, 6, 0).items == [402, 993, 40, 186, 583, 225]
    assert draw(rows(1000), lambda _, r: r, 6, 1).items != draw(rows(1000), lambda _, r: r, 6, 0).items


@pytest.mark.parametrize("n", [3, 50])
def test_a_smaller_sample_begins_a_larger_one(n):
    larger = draw(rows(n), lambda _, r: r, 40, 3).items
    assert draw(rows(n), lambda _, r: r, 7, 3).items == larger[:7]
    assert len(set(larger)) == min(n, 40)


def test_rows_that_hold_nothing_are_as_if_they_were_not_there():
    drawn = draw(rows(100), lambda _, r: r if r % 2 else None, 60, 0)
    assert sorted(drawn.items) == list(range(1, 100, 2)) and len(drawn.empty) == 50 and drawn.seen == 100


def test_every_row_is_drawn_equally_often():
    counts = Counter(r for seed in range(2000) for r in draw(rows(10), lambda _, r: r, 3, seed).items)
    # 600 expected each; the standard deviation is 20.5
    assert len(counts) == 10 and all(abs(c - 600) < 5 * 20.5 for c in counts.values())


def test_few_records_are_opened_and_few_are_held():
    opened = []
    drawn = draw(rows(100_000), lambda n, r: opened.append(n) or r, 16, 0)
    # 16 (1 + ln(100000 / 16)) = 156
    assert len(drawn.items) == 16 and len(opened) < 250
