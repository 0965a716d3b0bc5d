"""The demonstration shows every setting, and what it shows is so."""

from __future__ import annotations

import time

import torch

from consilience.cli.main import main
from consilience.demo import demo


def test_demo_runs_every_setting_in_a_minute(tmp_path, capsys):
    (tmp_path / "report.html").write_text("an old one")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on busy cores, threads that wait for each other take ten times as long
    start = time.process_time()
    results = demo(tmp_path)
    torch.set_num_threads(threads)
    assert time.process_time() - start < 60
    text = capsys.readouterr().out
    settings = ["multitask", "continual", "federated", "federated_continual", "merging", "exmodel", "skill"]
    assert list(dict.fromkeys(r.setting for r in results)) == settings
    assert text.count("setting ") >= len(settings)
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    score = {(r.setting, r.method): r.score for r in results if not r.sources[-1].endswith("permuted-4")}
    assert score["continual", "er"] > score["continual", "finetune"] + 0.2
    permuted = {r.method: r.score for r in results if r.sources[-1].endswith("permuted-4")}
    assert permuted["ewc"] > permuted["finetune"] + 0.05
    assert score["exmodel", "oracle_ensemble"] > score["exmodel", "parameter_average"]
    assert all(r.score > r.matrix[0].mean() + 0.05 for r in results)
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "again.html")]) == 0
