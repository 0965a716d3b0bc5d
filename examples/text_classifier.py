"""A text classifier: which chapter of Python's manual is a paragraph from?

A sample has two parts, `input_ids` and `attention_mask`, as models of transformers take them, and samples
differ in length. Run it with `python examples/text_classifier.py`.
"""

from __future__ import annotations

from pydoc_data.topics import topics

from torch import Tensor, nn

import consilience as cs

CHAPTERS = ("compound", "specialnames", "string-methods", "formatstrings", "debugger", "import")
WORDS = 1000


class Classifier(nn.Module):
    """The mean embedding of the words that the mask counts, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, 32), nn.Linear(32, len(CHAPTERS))

    # The parts of a sample are given by their names.
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask.unsqueeze(-1).to(self.embed.weight)
        return self.head((self.embed(input_ids) * mask).sum(1) / mask.sum(1))


def source() -> cs.Source:
    """Paragraphs of at least five words, and the chapter of each."""
    pairs = [(paragraph, chapter) for chapter in CHAPTERS for paragraph in topics[chapter].split("\n\n")]
    pairs = [pair for pair in pairs if len(pair[0].split()) >= 5]
    texts, chapters = [text for text, _ in pairs], [chapter for _, chapter in pairs]

    # Any tokenizer will do, such as one of transformers; this one is a vocabulary of the training texts.
    return cs.data.text(texts, chapters, "words", vocabulary=WORDS, classes=CHAPTERS, name="manual")


def main() -> None:
    """Run one model in four settings."""
    everything = source()
    tasks = cs.data.split_classes(everything, 3)
    clients = cs.data.dirichlet(everything, 5, alpha=0.5)
    training = cs.Training(epochs=5, lr=0.02, optimiser="adam")
    runs = [
        (cs.settings.continual(tasks, "class"), cs.methods.er(size=200)),
        (cs.settings.federated(clients, rounds=4), cs.methods.fedavg()),
        (cs.settings.multitask(tasks, "task"), cs.methods.pcgrad()),
        (cs.settings.merging(clients), cs.methods.average()),
    ]
    results = [cs.run(schedule, method, Classifier, training) for schedule, method in runs]
    print(cs.report.table(results))


if __name__ == "__main__":
    main()
