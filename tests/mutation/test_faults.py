"""The faults that `run.py` plants still have their places. Planting them takes minutes: `nox -s mutation`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.mutation.faults import FAULTS


@pytest.mark.parametrize("file", sorted({fault.file for fault in FAULTS}))
def test_faults_have_a_place_and_tests(file: str, root: Path) -> None:
    source = (root / file).read_text(encoding="utf-8")
    for fault in FAULTS:
        if fault.file == file:
            assert fault.planted(source) != source  # ValueError: the text that it replaces has changed
            assert fault.tests()


def test_no_fault_is_there_twice_and_every_module_has_some() -> None:
    assert len(set(FAULTS)) == len(FAULTS)
    per_module = Counter(Path(fault.file).name[:3] for fault in FAULTS)
    assert all(per_module[f"m{number:02}"] >= 4 for number in (*range(2, 15), 16))
