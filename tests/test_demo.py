"""The demonstration shows every setting, and what it shows is so."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from consilience import api
from consilience import demo as module
from consilience.cli.main import main
from consilience.demo import demo, scenes


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


def test_an_interrupted_demo_says_what_is_there_and_how_to_go_on(tmp_path, capsys, monkeypatch):
    first, second = scenes()[2], scenes()[5]
    short = [scene._replace(training=replace(scene.training, epochs=1)) for scene in (first, second)]
    monkeypatch.setattr(module, "scenes", lambda: short)
    run, calls = api.run, []

    def stopped_at(number):
        def interrupted(*args, **more):
            calls.append(args)
            if len(calls) == number:
                raise KeyboardInterrupt
            return run(*args, **more)

        calls.clear()
        monkeypatch.setattr(api, "run", interrupted)
        code = main(["demo", "--out", str(tmp_path / "demo")])
        return code, capsys.readouterr().err

    code, text = stopped_at(2)
    again = f"`consilience demo --out {tmp_path / 'demo'}` begins again"
    assert code == 130 and "nothing was written" in text and again in text
    code, text = stopped_at(len(first.methods) + 1)
    assert (
        code == 130 and f"{len(first.methods)} results of 1 finished scene are in {tmp_path / 'demo'}" in text
    )
    assert main(["report", str(tmp_path / "demo"), "-o", str(tmp_path / "x.html")]) == 0
