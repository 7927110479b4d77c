from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest

from diffusion.errors import UserError
from diffusion.sampling.generation import cut
from diffusion.sampling.partial import PartialSamples, missing


def pictures(indices: range) -> np.ndarray:
    """Image i is full of i."""
    return np.array(indices, np.uint8).reshape(-1, 1, 1, 1).repeat(2, 1).repeat(2, 2).repeat(3, 3)


def test_gaps_are_what_no_part_covers() -> None:
    pieces = [range(a, b) for a, b in combinations(range(8), 2)]
    for one, other in combinations(pieces, 2):
        gaps = missing(sorted([one, other], key=lambda r: (r.start, r.stop)), 7)
        assert {i for gap in gaps for i in gap} == set(range(7)) - set(one) - set(other)
        assert all(len(gap) for gap in gaps)
        assert all(a.stop < b.start for a, b in pairwise(gaps))
    assert missing([], 7) == [range(7)]


def test_what_remains_of_a_set_has_the_batches_of_the_whole() -> None:
    whole = cut(range(23), 5)
    assert [i for batch in whole for i in batch] == list(range(23))
    assert all(len(batch) <= 5 for batch in whole)
    for a in range(len(whole)):
        for b in range(a, len(whole)):
            assert cut(range(whole[a].start, whole[b].stop), 5) == whole[a : b + 1]
    assert cut(range(7, 13), 5) == [range(7, 10), range(10, 13)]


def test_parts_come_back_as_one_set(tmp_path: Path) -> None:
    parts = PartialSamples(tmp_path / "parts")
    for indices in (range(8, 12), range(3), range(3, 8), range(2, 5)):
        parts.save(indices, pictures(indices))
    np.testing.assert_array_equal(parts.collect(12), pictures(range(12)))
    with pytest.raises(UserError, match="lacks images 12 to 14"):
        parts.collect(15)
    parts.remove()
    assert not parts.folder.exists()
    assert list(parts.found()) == []


def test_a_damaged_part_is_drawn_again(tmp_path: Path) -> None:
    parts = PartialSamples(tmp_path)
    for indices in (range(4), range(4, 8), range(8, 12)):
        parts.save(indices, pictures(indices))
    torn, changed, _ = sorted(tmp_path.iterdir())
    torn.write_bytes(torn.read_bytes()[:60])
    data = bytearray(changed.read_bytes())
    data[len(data) // 2] ^= 1  # zip's checksum
    changed.write_bytes(data)
    (tmp_path / "00000012-00000016.npz").write_bytes((tmp_path / "00000008-00000012.npz").read_bytes()[:0])
    (tmp_path / "other.npz").write_bytes(b"")
    assert [indices for indices, _ in parts.found()] == [range(8, 12)]


def test_a_part_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file, **_: object) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="disk full"):
        PartialSamples(tmp_path).save(range(2), pictures(range(2)))
    assert list(tmp_path.iterdir()) == []
