"""The split into training and validation: linked photos stay together, and new data move nothing else."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset.records import Entry, Photo, Turn, split_entries
from errors import UserError

TAG = "<|extra_0|>"


def numbered_photos(count):
    return {ID: Photo(ID, f"train2017/{ID:012}.jpg", f"{ID:012}.jpg", Path("/x")) for ID in range(count)}


def entry(ID, text="Why?"):
    return Entry("s", "s", (Turn(text, ("So.",), images=() if ID is None else (ID,)),))


def test_split_keeps_photos_whole_and_meets_the_share():
    photos = numbered_photos(2000)
    entries = [entry(ID, text) for ID in photos for text in ("1?", "2?")] + [entry(None, f"{n}?") for n in range(2000)]
    train, val = split_entries(photos, entries, 0.1)
    assert len(train) + len(val) == len(entries)
    assert {e.images for e in train if e.images}.isdisjoint({e.images for e in val})
    assert 150 < len({e.images for e in val}) < 250
    assert 150 < sum(not e.images for e in val) < 250


@given(st.lists(st.integers(0, 40)), st.floats(0, 0.99), st.integers(0, 40))
def test_split_moves_nothing_when_data_come_or_ids_change(IDs, fraction, shift):
    photos = numbered_photos(41)
    train, val = split_entries(photos, [entry(ID) for ID in IDs], fraction)
    more_train, more_val = split_entries(photos, [entry(ID) for ID in [*range(41), *IDs]], fraction)
    assert set(train) <= set(more_train)
    assert set(val) <= set(more_val)
    moved = {(ID + shift) % 41: photo for ID, photo in photos.items()}
    _, moved_val = split_entries(moved, [entry((ID + shift) % 41) for ID in IDs], fraction)
    assert [photos[e.images[0]].key for e in val] == [moved[e.images[0]].key for e in moved_val]


def test_split_without_share():
    photos = numbered_photos(50)
    assert split_entries(photos, [entry(ID) for ID in photos], 0.0)[1] == []


def test_split_is_the_same_in_every_release():
    photos = numbered_photos(60)
    _, val = split_entries(photos, [entry(ID) for ID in photos], 0.05)
    assert [e.images[0] for e in val] == [2, 9]


def linked(*IDs):
    return Entry("s", "s", (Turn(TAG * len(IDs) + "Same?", ("No.",), images=IDs),))


def turn_by_turn(*lists):
    turns = [Turn(TAG * len(IDs) + "Same?", ("No.",), images=tuple(IDs)) for IDs in lists]
    return Entry("s", "s", tuple(turns))


def links(lists):
    """The sets of linked photos, by joining sets that share a photo until none do."""
    sets = [set().union(*images) for images in lists]
    joined = []
    for group in sets:
        for other in [other for other in joined if other & group]:
            joined.remove(other)
            group = group | other
        joined.append(group)
    return [group for group in joined if group]


MANY_TURNS = st.lists(st.lists(st.integers(0, 60), max_size=2), min_size=1, max_size=3)


@given(st.lists(MANY_TURNS, min_size=1, max_size=25), st.floats(0.01, 0.99))
def test_photos_linked_through_any_turn_stay_together(lists, fraction):
    """The side of an entry is that of its linked photos' first key alone, compared with sets joined one by one."""
    photos = numbered_photos(61)
    entries = [turn_by_turn(*images) for images in lists]
    groups = links(lists)
    total = sum(map(len, groups))
    if groups and max(map(len, groups)) == total > 1:
        with pytest.raises(UserError, match="link all"):
            split_entries(photos, entries, fraction)
        return
    train, val = split_entries(photos, entries, fraction)
    assert sorted([*train, *val], key=repr) == sorted(entries, key=repr)
    side = {}
    for group in groups:
        single, held_out = split_entries(photos, [entry(min(group))], fraction)
        most = len(group) > 1 and 2 * len(group) > total
        side |= dict.fromkeys(group, "train" if single or most else "val")
        assert bool(single) != bool(held_out)
    assert [{side[ID] for ID in e.images} for e in train if e.images] == [{"train"} for e in train if e.images]
    assert [{side[ID] for ID in e.images} for e in val if e.images] == [{"val"} for e in val if e.images]


@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=3), min_size=1), st.floats(0, 0.99))
def test_no_photo_is_on_both_sides(image_lists, fraction):
    photos = numbered_photos(31)
    entries = [linked(*IDs) for IDs in image_lists]
    try:
        train, val = split_entries(photos, entries, fraction)
    except UserError:  # all photos are one component
        reached = set(image_lists[0])
        for _ in image_lists:
            reached |= {ID for IDs in image_lists if reached & set(IDs) for ID in IDs}
        assert reached == {ID for IDs in image_lists for ID in IDs}
        return
    assert sorted(train + val, key=repr) == sorted(entries, key=repr)
    assert {ID for e in train for ID in e.images}.isdisjoint({ID for e in val for ID in e.images})


def test_the_first_key_of_linked_photos_decides():
    photos = numbered_photos(60)  # of which 2 and 9 are held out by themselves, see above
    singles = [entry(ID) for ID in photos]
    pairs = [linked(9, 10), linked(10, 11), linked(2, 1), linked(40, 40)]
    train, val = split_entries(photos, [*singles, *pairs], 0.05)
    assert val == [entry(9), entry(10), entry(11), linked(9, 10), linked(10, 11)]
    assert len(train) + len(val) == 64


def test_linked_photos_that_are_most_of_all_train():
    photos = numbered_photos(60)
    chain = [linked(ID, ID + 1) for ID in range(2, 59)]  # 2 is the key that decides, and would be held out
    train, val = split_entries(photos, [entry(0), entry(1), *chain], 0.05)
    assert train == [entry(0), entry(1), *chain]
    assert val == []
    with pytest.raises(UserError, match="'data.val_fraction' = 0.05: entries with several photos link all 58 photos"):
        split_entries(photos, chain, 0.05)
    assert split_entries(photos, chain, 0.0) == (chain, [])
