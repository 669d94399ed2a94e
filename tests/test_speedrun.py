"""The ledger: its rules are frozen, a run goes from nothing to a score, and the table is of the ledger."""

from dataclasses import replace

import pytest

from benchmarks import speedrun
from benchmarks.rivals.contest import Size
from benchmarks.speedrun import COUNT, RULES, Entry, FromNothing


def test_the_rules_are_those_of_the_hash():
    assert speedrun.rules() == RULES


def test_rendered_clips_score_what_the_page_says():
    """The ceiling: the scenes of the prompts themselves."""
    from benchmarks.rivals.contest import prompts, rendered

    class Rendered(FromNothing):
        def generate(self, captions, seeds):
            rows = prompts(self.size.names, COUNT)
            return rendered([rows[i] for i in seeds], 48)

    found = speedrun.score(Rendered(Size(), None))
    assert 92 <= found["score"] <= 100 and found["place"] >= 98


def test_a_run_goes_from_nothing_to_a_score(tmp_path, monkeypatch, small_batches):
    monkeypatch.setattr("cogvideo.train.objectives.UNQUANTISED", 2)
    monkeypatch.setattr("benchmarks.rivals.phased.MEASURED_STEPS", 1)
    monkeypatch.setattr("cogvideo.train.inherit.CAPTIONS", 500)
    monkeypatch.setattr(speedrun, "COUNT", 2)
    system = FromNothing(Size(layers=1, width=64, sprites=4), tmp_path / "run")
    system.train(0.001, None, 0)
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"crops", "image", "stage1", "stage2"}
    found = speedrun.score(system)
    assert 0 <= found["score"] <= found["sprite"] <= 100


def test_the_table_has_the_mean_of_the_seeds_best_first_and_leaves_other_rules_out():
    first = Entry("2026-11-27", "abc", "first", 20, 2, 0, 10.0, 20.0, 30.0, 40.0, RULES)
    entries = [
        first,
        replace(first, seed=1, score=20.0),
        replace(first, commit="def", change="better", score=40.0),
    ]
    lines = speedrun.table([*entries, replace(first, rules="other", score=99.0)]).splitlines()
    assert len(lines) == 4 and "| 40.0 |" in lines[2] and "| 15.0 | 10.0, 20.0 |" in lines[3]


@pytest.mark.parametrize("entry", speedrun.read(), ids=lambda entry: f"{entry.commit}-{entry.seed}")
def test_the_page_shows_what_the_ledger_holds(entry):
    assert entry.change in speedrun.PAGE.read_text(encoding="utf-8")
