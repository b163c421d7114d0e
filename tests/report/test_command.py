"""``ssa report`` and :func:`ssa.report.build_report`: files written, errors that say what to do."""

import os
import sys

import pytest

from ssa.cli import report as command
from ssa.errors import ConfigError, DiskError, MissingDependencyError
from ssa.report import build_report


@pytest.fixture
def small(evaluation, write_run, tmp_path):
    document = evaluation("ssa", 0)
    document.update(attention=[], selection_map=None)
    return write_run(tmp_path / "run", document)


def test_the_command_prints_the_table_and_writes_page_and_figures(small, tmp_path, capsys):
    out, figures = tmp_path / "new" / "report.html", tmp_path / "figures"
    assert command.run([str(small), "--out", str(out), "--figures", str(figures)]) == 0
    printed = capsys.readouterr().out
    assert "Perplexity, full attention" in printed
    assert f"written to {out}" in printed
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [path.name for path in figures.iterdir()] == ["budget.png"]
    assert [path.name for path in out.parent.iterdir()] == ["report.html"], "no temporary file stays"


def test_the_same_results_give_the_same_bytes(small, tmp_path):
    pages = [build_report([small], tmp_path / name).read_bytes() for name in ("a.html", "b.html")]
    assert pages[0] == pages[1]


def test_wrong_arguments_are_named(small, tmp_path):
    with pytest.raises(ConfigError, match="no run folder"):
        command.run([])
    with pytest.raises(ConfigError, match=r"expected a file name; try .*report\.html"):
        build_report([small], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError):
        build_report([small], tmp_path / "file" / "report.html")


def test_a_failed_write_keeps_the_old_page(small, tmp_path, monkeypatch):
    out = tmp_path / "report.html"
    out.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DiskError, match="No space left"):
        build_report([small], out)
    assert out.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "run"]


@pytest.mark.parametrize("module", ["matplotlib", "jinja2"])
def test_a_missing_package_is_named_with_its_cure(small, tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'sparse-sparse-attention\[eval\]'") as caught:
        build_report([small], tmp_path / "report.html")
    assert module in str(caught.value)
