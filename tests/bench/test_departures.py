"""The docs cite what exists, and the program behind docs/departures.md counts correctly."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench import measure_departures

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("page", ["departures", "branch_viability", "vllm", "performance", "mechanism"])
def test_what_a_page_cites_exists(page):
    text = (ROOT / "docs" / f"{page}.md").read_text("utf-8")
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text):
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text("utf-8"), re.MULTILINE), (file, name)
    named = set(re.findall(r"\b((?:bench|opsd|testbed|tests|launchers)/[\w/]+\.(?:py|sh))\b", text))
    named |= {f"docs/{target}" for target in re.findall(r"\]\(([\w/.]+)\)", text)}
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_departure_of_the_published_code_has_its_row():
    text = (ROOT / "docs" / "departures.md").read_text("utf-8")
    rows = re.findall(r"^\| \*\*(.+?)\*\* \|", text, re.MULTILINE)
    assert len(rows) == len(set(rows)) == 24
    # Each row of the first table says which of the paper's rows it moves, by which half, and how far.
    first = text.split("## Differences in how")[0]
    for row in re.findall(r"^\| \*\*.+\|$", first, re.MULTILINE):
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert len(cells) == 6, row
        assert re.match(r"(all|Qwen3-4B|DSR1|Olmo-3).*; (training|evaluation)", cells[1]), row
        assert re.search(r"\d|NaN|not measured", cells[4]), row


def test_a_prompt_of_dsr1s_kind_begins_once_here_and_two_or_three_times_there():
    tokenizer = measure_departures.bos_tokenizer(str(ROOT / "testbed" / "base_model"))
    counts = measure_departures.beginnings(tokenizer, "Find 12 + 30.")
    assert counts == {"teacher and evaluation": 2, "rollout": 3, "here": 1}


def test_bf16_loses_small_steps_and_float32_does_not():
    (adapter,) = measure_departures.bf16_adapter(None)
    assert (adapter.theirs, adapter.ours) == ("90.0% unmoved", "0.0% unmoved")
    (merge,) = measure_departures.bf16_merge(None)
    lost = float(re.match(r"([\d.]+)% of the entries unchanged", merge.theirs)[1])
    assert 15 < lost < 30
