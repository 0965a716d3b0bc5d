"""Baselines of continual learning."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from consilience.core.method import Method


def finetune() -> Method:
    """Plain training on each source; received parameters are averaged.

    Paper: the lower bound of continual learning; FedAvg where clients are averaged.
    """
    from consilience.core.method import Method

    return Method("finetune")


def cumulative() -> Method:
    """Training goes on, at each source on all data seen so far as one pool.

    Paper: Maltoni & Lomonaco 2019.
    """
    from consilience.core.method import Method
    from consilience.corrections.baselines import Cumulative

    return Method("cumulative", (Cumulative(),))


def joint() -> Method:
    """At each source new parameters are trained on all data seen so far as one pool: the upper bound.

    Paper: Caruana 1997.
    """
    from consilience.core.method import Method
    from consilience.corrections.baselines import Cumulative

    return Method("joint", (Cumulative(scratch=True),))


def from_scratch() -> Method:
    """Every source is learned alone, from new parameters: what it reaches without any transfer.

    Paper: the reference of forward transfer (Lopez-Paz & Ranzato 2017).
    """
    from consilience.core.method import Method
    from consilience.corrections.baselines import FromScratch

    return Method("from_scratch", (FromScratch(),))


def scroll(
    size: int = 500, strength: float = 0.01, temperature: float = 0.1, lr: float | None = 0.001
) -> Method:
    """SCROLL: a ridge head from sums over all data so far, then fine-tuning on a class-balanced buffer.

    Each visit begins at the model's first parameters, so that the order of the stream and its cuts into
    sources change no more than what the buffer draws. The buffer is seen as often as it fits into the source.

    The learning rate must be one to two orders below that of a cold start: 0.05 destroys the head (digits:
    .24 instead of .96).

    Paper: Wang et al. 2022.

    Args:
        size: examples in the buffer, over all classes.
        strength: lambda of the ridge, entered once.
        temperature: divides the head, which leaves the argmax and suits the softmax that is trained on.
        lr: learning rate of the fine-tuning, in the place of `Training.lr`; None: that one.
    """
    from consilience.core.method import Method
    from consilience.corrections.exemplars import GDumb
    from consilience.corrections.solved import StreamHead

    return Method(
        "scroll",
        (StreamHead(strength, temperature), GDumb(size, scratch=False)),
        fixed=fixed_rate(lr),
    )


def fixed_rate(lr: float | None) -> dict[str, float]:
    """Return `Method.fixed` of a learning rate in the place of that of `Training`; None: that one."""
    from consilience.core.training import check_number

    if lr is None:
        return {}
    check_number("lr", lr, "positive and finite, or None", lambda value: value > 0)
    return {"lr": lr}
