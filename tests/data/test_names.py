"""Names kept as bytes."""

import os

import numpy as np

from fastsimclr.data.names import Names

WORDS = ["a.jpg", "", "b/ä.png", os.fsdecode(b"\xff.jpg"), "new\nline.jpg"]


def test_names_are_the_strings_they_were_made_of() -> None:
    names = Names.of(WORDS)
    assert (len(names), list(names), names[-1]) == (len(WORDS), WORDS, WORDS[-1])
    assert list(Names.of([])) == []


def test_names_at_indices_keep_their_order() -> None:
    chosen = np.array([3, 0, 0, 1])
    assert list(Names.of(WORDS)[chosen]) == [WORDS[n] for n in chosen]
    assert list(Names.of(WORDS)[np.array([], np.int64)]) == []


def test_digest_tells_apart_where_names_end() -> None:
    assert Names.of(["ab", "c"]).digest() == Names.of([b"ab", b"c"]).digest() != Names.of(["a", "bc"]).digest()
