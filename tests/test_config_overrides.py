"""What is wrong with a config or an override is one line that names the field."""

from types import SimpleNamespace

import pytest

from hobbit_jax import config_overrides

CONFIG = """
from ml_collections import ConfigDict
def get_config(arg="full"):
    if arg == "bad":
        raise ValueError("want :full")
    return ConfigDict({"title": "t", "windows": 3, "cache": {"budget_mib": (1.0, 2.0)}})
"""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--config.budget_mib=4",), r"no such field; the nearest is config\.cache\.budget_mib"),
        (("--config.cache.budget=4",), r"no such field; the nearest is config\.cache\.budget_mib"),
        (("--config.cache.budget_mib.x=4",), "no such field"),
        (("--config.cache.budget_mib=abc",), "budget_mib is 'abc'; want numbers"),
        (("--config.cache.budget_mib=1,nan",), "budget_mib is '1,nan'; want numbers"),
        (("--config.windows=many",), "windows is 'many'; want a number"),
        (("--config.windows=4", "--config.cache.budget_mib=(1,2)", "--config.title=x"), None),
    ],
)
def test_overrides(monkeypatch, tmp_path, overrides, message):
    monkeypatch.setattr(config_overrides, "flags", SimpleNamespace(FLAGS={"config"}))
    (tmp_path / "c.py").write_text(CONFIG)
    for given in ([f"--config={tmp_path}/c.py"], ["--config", f"{tmp_path}/c.py:small"]):
        argv = ["sweep.py", *given, *overrides]
        if message is None:
            config_overrides.check(argv)
            continue
        with pytest.raises(ValueError, match=message):
            config_overrides.check(argv)


def test_files_that_are_no_config(monkeypatch, tmp_path):
    monkeypatch.setattr(config_overrides, "flags", SimpleNamespace(FLAGS={"config"}))
    (tmp_path / "c.py").write_text(CONFIG)
    (tmp_path / "text.md").write_text("KL ×0.54")
    (tmp_path / "broken.py").write_text("KL ×0.54")
    (tmp_path / "empty.py").write_text("")
    for name, message in (
        ("absent.py", "is no config file"),
        ("text.md", "is no config file"),
        ("", "is no config file"),
        ("broken.py", "gives no config .SyntaxError"),
        ("empty.py", "gives no config .AttributeError"),
        ("c.py:bad", "want :full"),
    ):
        with pytest.raises(ValueError, match=message):
            config_overrides.check(["sweep.py", f"--config={tmp_path}/{name}"])
    config_overrides.check(["generate.py", "--prompt", "--config"])
