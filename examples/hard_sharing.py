"""Hard sharing: a trunk that three tasks share, each with a head of two layers, a loss and a metric."""

import torch

import consilience as cs

x = torch.randn(2000, 128, generator=torch.Generator().manual_seed(0))
targets = {"sentiment": x[:, :3].argmax(1), "ner": x[:, 3:12].argmax(1), "rating": x[:, :4].sum(1)}
tasks = cs.data.tasks(x, targets, {"rating": "value"})
model = cs.models.multi_head(cs.models.mlp(128, (256, 128, 64)), outputs=3 + 9 + 1, hidden=(32,))
training = cs.Training(epochs=20, optimiser="adam", lr=1e-3, loss={"rating": "huber"})
result = cs.run(cs.settings.multitask(tasks, "task"), cs.methods.finetune(), model, training)
print(*zip(result.sources, result.measured_by, result.matrix[-1].round(2), strict=True))
