"""What other versions wrote, and names that must survive a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import consilience as cs
from consilience.core.params import same
from consilience.loop.checks import RunOptions
from consilience.loop.run import begin, drive
from consilience.loop.session import saved_agents
from consilience.loop.trial import agent_states
from restate import mlp, source, training

# Written by version 0.1.0 (commit 35aeb81): fedavg of two clients for one round, with `clients=True`.
RESULT: dict[str, Any] = json.loads("""
{"setting": "federated", "data": "t", "method": "fedavg", "model": "linear", "repeats": 1, "seed": 0,
 "metric": "accuracy", "score": 0.4, "score_std": 0.0, "matrix": [[0.4, 0.4], [0.4, 0.4]], "forgetting": null,
 "backward_transfer": null, "forward_transfer": null, "normalised": 1.0, "macs": 204, "bytes": 2248,
 "seconds": 4.697, "versions": {"consilience": "0.1.0", "torch": "2.13.0+cpu", "python": "3.11.7",
  "engine": "serial", "threads": 1, "machine": "x86_64", "cpus": 2},
 "sources": ["t/client-0", "t/client-1"], "stages": ["round 1"], "learned_at": [1, 1],
 "matrices": [[[0.4, 0.4], [0.4, 0.4]]], "mapper": null, "mapper_accuracy": null,
 "costs": {"macs": 204, "bytes": 2248, "steps": 3, "seconds": 4.697, "by_agent": {
  "client-0": {"macs": 108, "sent": 562, "received": 562, "absorbing": 0},
  "client-1": {"macs": 96, "sent": 562, "received": 562, "absorbing": 0},
  "server": {"macs": 0, "sent": 1124, "received": 1124, "absorbing": 7}}},
 "curve": [{"score": 0.4, "macs": 0, "bytes": 0, "seconds": 0.001},
  {"score": 0.4, "macs": 204, "bytes": 2248, "seconds": 4.697}], "learning_curve": [],
 "config": {"setting": "federated", "scenario": "class", "sources": ["t/client-0", "t/client-1"],
  "method": "fedavg", "model": "linear(3, 2)", "training": {"epochs": 1, "batch_size": 8, "lr": 0.05,
   "schedule": "constant", "rates": null}, "seed": 0, "repeats": 1},
 "worst": 0.4, "spread": 0.0, "global_forgetting": null, "local_forgetting": null,
 "drift": [{"stage": 1, "agent": "server", "clients": 2, "distance": 0.03846145306624952,
  "distance_max": 0.07001519939483601, "cosine": 0.8896574139254585}],
 "local": [{"stage": 1, "agent": "client-0", "own_before": 0.4, "own_after": 0.4, "others_before": null,
   "others_after": null},
  {"stage": 1, "agent": "client-1", "own_before": 0.4, "own_after": 0.4, "others_before": null,
   "others_after": null}],
 "personal": {"client-0": 0.4, "client-1": 0.4}}
""")
INDEX = {
    "file": "state-18ecc4035cee1461.safetensors",
    "sha256": "0b9b285b348bdc06377ef6adf75bc67e9556f293a1e9c6a32ab0a59c429756e4",
    "facts": {"fingerprint": {"setting": "federated"}, "walks": {"0": {"phase": 4, "learned": 0}}},
}
LOG = '{"event": "begin", "versions": {"consilience": "0.1.0"}}\n'

A, B = source("a|b", seed=1), source("a", seed=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a run of 0.1."""
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "index.json").write_text(json.dumps(INDEX))
    (tmp_path / "log.jsonl").write_text(LOG)
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    return tmp_path


def resume(out: Path) -> cs.Result:
    return cs.run(
        cs.settings.continual([A, B]), cs.methods.finetune(), mlp(), training(), out=out, resume=True
    )


def test_results_of_0_1_are_read(folder):
    found = cs.report.load(folder)
    assert found.client_drift == RESULT["drift"]
    assert found.costs["by_agent"]["server"] == {"macs": 0, "sent": 1124, "received": 1124, "receiving": 7}
    assert found.score == 0.4 and found.personal == {"client-0": 0.4, "client-1": 0.4}
    assert "fedavg" in cs.report.table([found])
    assert "fedavg" in cs.report.write([found], folder / "report.html").read_text()
    assert cs.Result.from_json(found.to_json()).to_json() == found.to_json()


def test_checkpoints_of_0_1_are_refused_in_one_sentence(folder):
    with pytest.raises(cs.ConsilienceError) as e:
        resume(folder)
    assert str(e.value) == (
        f"the checkpoint in {folder} is of format 1, written by consilience 0.1.0, "
        f"and consilience {cs.__version__} resumes format 4; resume it with consilience 0.1.0, "
        "or start again in another folder."
    )
    (folder / "log.jsonl").unlink()
    with pytest.raises(cs.ConsilienceError, match=r"written by consilience 0\.1, and"):
        resume(folder)


def test_checkpoints_of_a_later_version_are_refused(tmp_path):
    cs.run(cs.settings.continual([A, B]), cs.methods.finetune(), mlp(), training(), out=tmp_path)
    path = tmp_path / "checkpoint" / "index.json"
    index = json.loads(path.read_text())
    assert index["format"] == 4 and index["consilience"] == cs.__version__
    path.write_text(json.dumps(index | {"format": 5, "consilience": "0.9.0"}))
    with pytest.raises(cs.ConsilienceError, match=r"is of format 5, written by consilience 0\.9\.0, and"):
        resume(tmp_path)


@pytest.mark.parametrize("method", [cs.methods.er(12, 8), cs.methods.si()], ids=lambda m: m.name)
def test_names_with_bars_survive_a_checkpoint(method, tmp_path):
    """Sources "a|b" and "a": what is kept of them is resumed to the same bits."""
    schedule = cs.settings.continual([A, B, source("b|a", seed=3)], "domain")

    def stop(line):
        if line["event"] == "checkpoint" and line["phase"] == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cs.run(schedule, method, mlp(), training(), out=tmp_path, checkpoint_steps=1, progress=stop)
    resumed = cs.run(schedule, method, mlp(), training(), out=tmp_path, resume=True)
    assert same(resumed.params, cs.run(schedule, method, mlp(), training()).params)


def test_agents_with_bars_are_told_apart():
    schedule = cs.settings.continual([A], "domain")
    options = RunOptions()
    session = begin(schedule, cs.methods.finetune(), mlp(), training(), cs.engines.serial(), options)
    drive([session], session.engine)
    (trial,) = session.trials
    for i, name in enumerate(("a", "a|b", "a|b|c", "%7C")):
        state = trial.agents[name].state
        trial.agents[name].state = state.change(
            params={n: torch.full_like(p, i) for n, p in state.params.items()}
        )
    tensors, facts = trial.kept()
    states = agent_states(tensors, json.loads(json.dumps(facts)))
    assert {name: state.params["1.weight"].mean().item() for name, state in states.items()} | {
        "a": 0,
        "a|b": 1,
        "a|b|c": 2,
        "%7C": 3,
    } == {name: agent.state.params["1.weight"].mean().item() for name, agent in trial.agents.items()}


def test_a_runs_folder_gives_its_agents(tmp_path):
    result = cs.run(
        cs.settings.continual([A], "domain"), cs.methods.finetune(), mlp(), training(), out=tmp_path
    )
    (state,) = saved_agents(tmp_path).values()
    assert same(dict(state.params), result.params)
    assert saved_agents(tmp_path / "nothing") == {}
