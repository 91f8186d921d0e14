"""digests.py: what changes the digests of a training, and what does not."""

import types
from pathlib import Path

import pytest

from benchmarks.evidence import digests
from fastgn.config import Config

BASE = Config().replace(data="digits", method="fgsm_rs")


@pytest.mark.parametrize(
    "values, changed",
    [
        ({"model": "swin_t"}, {"network"}),
        ({"attack_eps": 0.1}, {"objective"}),
        ({"ramp_epochs": 3.0}, {"objective"}),
        ({"lr": 0.1}, {"training"}),
        ({"seed": 5}, {"training"}),
        ({"gn_weight": 7.0}, set()),  # an option of another method
        ({"output": "elsewhere", "data_dir": "/there"}, set()),
    ],
)
def test_each_option_changes_its_digest(values: dict, changed: set) -> None:
    ours, theirs = digests.digests_of(BASE), digests.digests_of(BASE.replace(**values))
    assert {key for key in ours if ours[key] != theirs[key]} == changed


def test_the_code_of_a_method_includes_what_it_calls() -> None:
    code = {method: digests.objective_code(method) for method in ("gradnorm+fgsm", "edge")}
    assert {len(modules) for modules in code.values()} == {3, 7}
    assert any("def fgsm_rs(" in text for text in code["gradnorm+fgsm"])
    assert not any("def fgsm_rs(" in text for text in code["edge"])


def test_words_do_not_change_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [
        'def f(x):\n    """Doubles."""\n    assert x, f"{x}"\n    return 2 * x  # quick\n',
        'def f(x):\n    """Returns 2 x."""\n    assert x, f"no {x}"\n    return 2 * x\n',
        "def f(x):\n    return 3 * x\n",
    ]
    found = []
    for number, text in enumerate(texts):
        monkeypatch.setattr(digests.inspect, "getsource", lambda module, text=text: text)
        found.append(digests.code_of(types.ModuleType(f"m{number}")))
    assert found[0] == found[1]
    assert found[1] != found[2] and "3 * x" in found[2]
