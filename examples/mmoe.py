"""Eight experts that three tasks of clicks share (MMoE), and how open the gate of each task is."""

import torch

import consilience as cs

x = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
tasks = cs.data.tasks(x, {name: (x[:, i] > 0).long() for i, name in enumerate(("ctr", "cvr", "engagement"))})
model = cs.models.mmoe(cs.models.mlp(64, (128, 64)), outputs=6, experts=8, hidden=(32,))
result = cs.run(cs.settings.multitask(tasks, "task"), cs.methods.finetune(), model)
print(*(f"{task} gate entropy: {own['layer 0']['entropy']:.3f}" for task, own in result.sharing.items()))
