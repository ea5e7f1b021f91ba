"""tests/programs/mutate_objectives.py runs by hand; its mutants must still apply."""

from __future__ import annotations

import ast

import pytest

from tests.programs.mutate_objectives import MUTANTS, ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_alters_one_place_and_stays_python(mutant):
    text = (ROOT / mutant.path).read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1
    assert mutant.new != mutant.old
    ast.parse(text.replace(mutant.old, mutant.new))
