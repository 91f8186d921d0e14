"""Warnings of trainings that go wrong, on made rows and on runs that are made to do it."""

from pathlib import Path

import pytest

from fastgn.objectives import AttackOptions, ObjectiveConfig
from fastgn.trouble import Watch, find_collapse, find_saturation


def rows(penalties: list[float], robust: list[float]) -> list[dict[str, float]]:
    """Returns rows of metrics.csv, every second one with an evaluation."""
    found: list[dict[str, float]] = []
    for penalty, accuracy in zip(penalties, robust, strict=True):
        found += [{"penalty": penalty}, {"penalty": penalty, "pgd10_accuracy": accuracy}]
    return found


def test_saturation_is_a_vanished_penalty_while_robustness_falls() -> None:
    line = find_saturation(rows([0.5, 2.0, 0.1, 0.0019], [0.2, 0.7, 0.8, 0.5]))
    assert line is not None and "from 2 to 0.0019" in line and "from 80.0% to 50.0%" in line
    assert "--smoothing 0.1" in line


@pytest.mark.parametrize(
    ("penalties", "robust"),
    [
        ([2.0, 0.1, 0.0021], [0.2, 0.8, 0.5]),  # the penalty is a thousandth and more
        ([2.0, 0.1, 0.0001], [0.2, 0.8, 0.79]),  # within the noise of an evaluation
        ([2.0, 0.1, 0.0001], [0.2, 0.8, 0.9]),
        ([0.0, 0.0], [0.5, 0.2]),
        ([], []),
    ],
)
def test_no_saturation(penalties: list[float], robust: list[float]) -> None:
    assert find_saturation(rows(penalties, robust)) is None
    assert find_saturation([{"penalty": p} for p in penalties]) is None


def test_collapse_is_a_network_that_withstands_fgsm_alone() -> None:
    line = find_collapse(0.81, 0.02)
    assert line is not None and "81.0% under FGSM, but 2.0% under PGD-10" in line
    assert "n_fgsm" in line
    for fgsm, robust in ((0.8, 0.41), (0.09, 0.0), (0.0, 0.0), (0.5, 0.6)):
        assert find_collapse(fgsm, robust) is None


def test_methods_with_one_attack_step() -> None:
    single = {"fgsm_rs", "n_fgsm", "gradnorm+fgsm"}
    for method in ("natural", "gradnorm", "pgd_at", "trades", *single):
        assert ObjectiveConfig(method).single_step is (method in single)
    one = AttackOptions(attack_it=1)
    assert ObjectiveConfig("pgd_at", attack=one).single_step
    assert not ObjectiveConfig("natural", attack=one).single_step


def test_each_kind_is_told_once(tmp_path: Path) -> None:
    watch = Watch()
    assert watch.find(None, 0.5) == watch.find(tmp_path / "lost.csv", 0.5, 0.6) == []
    assert len(watch.find(None, 0.1, 0.8)) == 1
    assert watch.find(None, 0.0, 0.9) == []
