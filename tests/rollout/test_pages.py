"""Who holds which page, under any order of taking, holding, filing and dropping."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.rollout.pages import OutOfPages, PagePool, page_digests


def test_a_page_and_its_holders():
    pool = PagePool(2, 8)
    a, b = pool.take(), pool.take()
    with pytest.raises(OutOfPages, match="all 2 pages of 8 tokens are held"):
        pool.take()
    pool.hold(a)
    assert pool.shared(a) and not pool.shared(b)
    pool.drop([a, a])
    assert (pool.held, pool.available) == (1, 1)
    assert pool.take() == a


def test_filed_pages_are_found_until_they_are_needed():
    pool = PagePool(2, 8)
    a, b = pool.take(), pool.take()
    pool.file(a, b"a")
    pool.file(b, b"b")
    pool.drop([b])
    pool.drop([a])
    assert (pool.find(b"a"), pool.find(b"b")) == (a, b)
    pool.hold(a)
    assert pool.take() == b  # the one longest without a holder
    assert pool.find(b"b") is None and pool.find(b"a") == a
    pool.drop([a, b])
    pool.forget()
    assert pool.find(b"a") is None and pool.available == 2


def test_content_is_filed_once():
    pool = PagePool(3, 8)
    a, b = pool.take(), pool.take()
    pool.file(a, b"a")
    pool.file(b, b"a")
    assert pool.find(b"a") == a
    pool.drop([a, b])
    assert [pool.take() for _ in range(3)].count(a) == 1


def test_digests_name_all_tokens_before():
    tokens = list(range(20))
    digests = page_digests(tokens, 8, [])
    assert len(digests) == 2
    assert page_digests([9, *tokens[1:]], 8, [])[1] != digests[1]
    assert page_digests(tokens[8:], 8, [])[0] != digests[1]
    known = digests[:1]
    assert page_digests(tokens, 8, known) == digests and known == digests


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["take", "hold", "drop", "file", "forget"]), st.integers(0, 30)), max_size=60)
)
def test_every_page_is_in_one_place(actions):
    pool = PagePool(5, 8)
    held: list[int] = []  # a page for each holder
    for action, number in actions:
        if action == "take" and len(set(held)) < 5:
            page = pool.take()
            assert page not in held and 0 <= page < 5
            held.append(page)
        elif action == "hold" and held:
            page = held[number % len(held)]
            pool.hold(page)
            held.append(page)
        elif action == "drop" and held:
            pool.drop([held.pop(number % len(held))])
        elif action == "file" and held:
            pool.file(held[number % len(held)], bytes([number]))
        elif action == "forget":
            pool.forget()
        found = [pool.find(bytes([n])) for n in range(31)]
        assert len([page for page in found if page is not None]) == len({page for page in found if page is not None})
        assert pool.held == len(set(held)) and pool.available == 5 - pool.held
        assert all(pool.shared(page) == (held.count(page) > 1) for page in set(held))
    rest = [pool.take() for _ in range(pool.available)]
    assert sorted(set(held) | set(rest)) == list(range(5))
