"""Three tasks on the same handwritten digits, of which one has random labels: which of them go together?

python examples/diagnosis.py [report.html]
"""

from __future__ import annotations

import sys

import torch

import consilience as cs

x, digit = cs.data.digits().train.whole()
noise = torch.randint(2, digit.shape, generator=torch.Generator().manual_seed(0))
targets = {"even": digit % 2, "large": (digit > 4).long(), "noise": noise}
tasks = cs.data.tasks(x, targets, name="digits")
model = cs.models.multi_head(cs.models.mlp(64, (32,)), outputs=6)
training = cs.Training(epochs=3, lr=0.1)

parts = ["transfer", "conflicts", "affinities", "groups"]
found = cs.diagnose(tasks, model, training, parts=parts, repeats=3, progress=True)
print(found.table())
if len(sys.argv) > 1:
    print(f"wrote {found.report(sys.argv[1])}")
