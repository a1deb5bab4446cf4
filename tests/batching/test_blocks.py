import pytest

from farthing.batching.blocks import OutOfPages, PagePool, page_hash


def chain(*pages: list[int]) -> list[bytes]:
    names: list[bytes] = []
    for tokens in pages:
        names.append(page_hash(names[-1] if names else b"", tokens))
    return names


def test_a_name_depends_on_everything_before_it() -> None:
    assert chain([1, 2], [3, 4])[1] != chain([9, 2], [3, 4])[1]
    assert chain([1, 2], [3, 4]) == chain([1, 2], [3, 4])


def test_released_pages_with_a_name_serve_the_next_sequence() -> None:
    pool = PagePool(4, page_size=2)
    names = chain([1, 2], [3, 4])
    pages = pool.allocate(3)
    for page, name in zip(pages, names, strict=False):
        pool.publish(page, name)
    pool.release(pages)
    assert (pool.free, pool.cached, pool.used) == (2, 2, 0)

    assert pool.match(names) == pages[:2]
    assert pool.match(names[:1]) == pages[:1]
    assert (pool.free, pool.cached, pool.used) == (2, 0, 2)
    pool.check_integrity()


def test_the_end_of_the_least_recently_used_prefix_is_taken_first() -> None:
    pool = PagePool(3, page_size=2)
    names = chain([1, 2], [3, 4], [5, 6])
    pages = pool.allocate(3)
    for page, name in zip(pages, names, strict=True):
        pool.publish(page, name)
    pool.release(pages)

    assert pool.allocate(1) == [pages[2]]
    assert pool.match(names) == pages[:2]
    pool.check_integrity()


def test_asking_for_too_much_takes_nothing() -> None:
    pool = PagePool(2, page_size=2)
    with pytest.raises(OutOfPages, match="3 pages asked for, 2 available"):
        pool.allocate(3)
    assert pool.free == 2


def test_without_prefix_caching_nothing_is_kept() -> None:
    pool = PagePool(2, page_size=2, prefix_caching=False)
    pages = pool.allocate(1)
    pool.publish(pages[0], chain([1, 2])[0])
    pool.release(pages)
    assert (pool.free, pool.cached) == (2, 0)
