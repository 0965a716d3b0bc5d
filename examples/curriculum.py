"""A curriculum: the easiest fifth of the digits at first, by a loss that is measured every five epochs.

Run it with `python examples/curriculum.py`.
"""

import consilience as cs

digits, log = cs.data.digits(), []
easy_first = cs.data.samplers.Curriculum("loss", pacing="linear", start=0.2, rescore=5)
training = cs.Training(epochs=15, lr=0.1, sampler=easy_first)
result = cs.run(
    cs.settings.continual([digits]), cs.methods.finetune(), training=training, progress=log.append
)
for epoch, count in enumerate(log[1]["examples"][digits.name], 1):
    print(f"Epoch {epoch}/15: {count / len(digits.train):.2%} of the data ({count} examples)")
print(f"Accuracy: {result.score:.3f}")
