"""Random forests of segments for the tests of layouts and attention."""

from hypothesis import strategies as st


@st.composite
def forests(draw: st.DrawFn, segments: int, length: int, least: int = 0) -> tuple[list[int], list[int]]:
    """Lengths of `least` to `segments` segments, and parents: each a root or a child of one on the path to the one
    before."""
    lengths = draw(st.lists(st.integers(0, length), min_size=least, max_size=segments))
    parents, path = [], []
    for i in range(len(lengths)):
        path = path[: draw(st.integers(0, len(path)))]
        parents.append(path[-1] if path else -1)
        path.append(i)
    return lengths, parents
