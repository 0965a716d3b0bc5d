"""Choosing among offered experts: by the names of classes, by agreement, and by what each would add."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from consilience.core.checks import whole_number
from consilience.core.errors import ConsilienceError
from consilience.core.source import Label, inputs_of
from consilience.core.synthetic import answers
from consilience.experts._card import Card, card_of
from consilience.experts._distil import teacher_of
from consilience.experts._files import GRAPHS, load

ALIKE = 0.8
"""The least similarity of two names that may mean the same class."""


class Match(NamedTuple):
    """The class of an expert that is nearest to a wanted one."""

    wanted: str
    label: Label
    similarity: float


@dataclass(frozen=True)
class Offer:
    """An expert that was offered: its `file` and `card`, and why it is suggested or not.

    `gain` is what it was expected to add to those that were suggested before it: the sum over wanted classes
    of how much better it is known, each in [0, 1]. `agreement` is the fraction of unlabelled inputs on which
    it answers as the others together do, over its own classes; None without data.
    """

    file: Path
    card: Card
    matches: tuple[Match, ...]
    gain: float
    agreement: float | None
    suggested: bool
    reason: str


@dataclass(frozen=True)
class Suggestion:
    """The offers, those that are suggested first, and the wanted classes that none of them knows."""

    offers: tuple[Offer, ...]
    missing: tuple[str, ...]

    @property
    def files(self) -> list[Path]:
        """The files that are suggested, in the order of their gain."""
        return [offer.file for offer in self.offers if offer.suggested]

    def table(self) -> str:
        """Write the offers with their reasons."""
        from consilience.core.names import clean
        from consilience.report._text import Column, grid

        shown = self.offers
        text = grid(
            [
                Column("use", ["yes" if offer.suggested else "" for offer in shown], False),
                Column("expert", [clean(offer.file.name) for offer in shown], False),
                Column("gain", [f"{offer.gain:.2f}" for offer in shown]),
                Column(
                    "agreement %",
                    ["-" if o.agreement is None else f"{100 * o.agreement:.0f}" for o in shown],
                ),
                Column("reason", [clean(offer.reason) for offer in shown], False),
            ]
        )
        if not self.missing:
            return text
        return f"{text}\n\nno offered expert knows {clean(', '.join(self.missing))}"


def suggest(
    folder: Path, wanted: Sequence[str | Label], data: Any, budget: int | None, trust: bool
) -> Suggestion:
    """Choose among the experts of a folder; see `consilience.experts.suggest`."""
    if budget is not None:
        whole_number(budget=budget)
    # A wanted label is called by the name of its class.
    names = [one if isinstance(one, str) else one[1] for one in wanted]
    if not names or len(set(names)) < len(names):
        raise ConsilienceError(f"`wanted` must be different names of classes, at least one, got {names}.")
    cards = offered(folder)
    matches = {file: matched(card, wanted) for file, card in cards.items()}
    agreement = {} if data is None else agreements(list(cards), data, trust)

    # Greedy: each time the expert that adds most to those before it.
    known = dict.fromkeys(names, 0.0)
    offers: list[Offer] = []
    left = list(cards)
    while left:
        # What is suggested already knows some classes, so gains change.
        gains = {file: gain_of(cards[file], matches[file], known, agreement.get(file)) for file in left}
        # Of equal ones the first by name, so that the order of files does not matter.
        best = max(left, key=lambda file: gains[file])
        full = budget is not None and sum(offer.suggested for offer in offers) >= budget
        use = gains[best] > 0 and not full
        reason = reason_of(cards[best], matches[best], known, gains[best], full)
        offers.append(Offer(best, cards[best], matches[best], gains[best], agreement.get(best), use, reason))
        left.remove(best)
        for match in matches[best] if use else ():
            worth = worth_of(cards[best], match, agreement.get(best))
            known[match.wanted] = max(known[match.wanted], worth)
    return Suggestion(tuple(offers), tuple(name for name, worth in known.items() if not worth))


def offered(folder: Path) -> dict[Path, Card]:
    """Return the cards of the experts in a folder and its subfolders, by file; no weights are read."""
    if not folder.is_dir():
        raise ConsilienceError(f"experts must be in a folder, got none at {folder}.")
    files = sorted(file for file in folder.rglob("*") if file.suffix in (".safetensors", *GRAPHS))
    # Other files may be weights of something else.
    found = {file: card for file in files if (card := card_of(file)) is not None}
    if not found:
        raise ConsilienceError(f"a folder of experts must have files with cards, got none in {folder}.")
    return found


def matched(card: Card, wanted: Sequence[str | Label]) -> tuple[Match, ...]:
    """Return the class of an expert that is nearest to each wanted one, as far as names are alike.

    A wanted (label space, name) is that class alone. Of names, 1 is the same but for case and separators.
    """
    found = []
    for one in wanted:
        if not isinstance(one, str):
            if tuple(one) in card.knows:
                found.append(Match(one[1], tuple(one), 1.0))  # type: ignore[arg-type]
            continue
        near = max(card.knows, key=lambda label: similarity(one, label[1]))
        value = similarity(one, near[1])
        if value >= ALIKE:
            found.append(Match(one, near, value))
    return tuple(found)


def similarity(one: str, other: str) -> float:
    """Return how alike two names are, in [0, 1].

    >>> similarity("Fire truck", "fire_truck"), similarity("cat", "cats") > 0.8, similarity("cat", "dog")
    (1.0, True, 0.0)
    """
    # Case and separators are habits of a data set, not other classes.
    first, second = (name.casefold().replace("_", " ").replace("-", " ").strip() for name in (one, other))
    return difflib.SequenceMatcher(None, first, second).ratio()


def worth_of(card: Card, match: Match, agreement: float | None) -> float:
    """Return how well a class is expected to be known: similarity x accuracy x agreement, each in [0, 1]."""
    # An expert without a score may be as good as a coin.
    accuracy = max(card.accuracy.values(), default=0.5)
    return match.similarity * accuracy * (1.0 if agreement is None else agreement)


def gain_of(
    card: Card, matches: Sequence[Match], known: Mapping[str, float], agreement: float | None
) -> float:
    """Return what an expert is expected to add: the sum of how much better it knows each wanted class."""
    return sum(max(0.0, worth_of(card, match, agreement) - known[match.wanted]) for match in matches)


def reason_of(
    card: Card, matches: Sequence[Match], known: Mapping[str, float], gain: float, full: bool
) -> str:
    """Say why an expert is suggested, or not."""
    if not matches:
        return "knows none of the wanted classes"
    listed = ", ".join(
        match.wanted if match.similarity == 1 else f"{match.wanted} (as {match.label[1]!r})"
        for match in matches
    )
    score = (
        f"accuracy {100 * max(card.accuracy.values()):.0f} %" if card.accuracy else "no accuracy in its card"
    )
    if gain <= 0:
        return f"knows {listed}, which others know as well ({score})"
    if full:
        return f"knows {listed} ({score}), but the budget is used"
    new = [match.wanted for match in matches if not known[match.wanted]]
    return f"knows {listed} ({score}){', new: ' + ', '.join(new) if known and new else ''}"


def agreements(files: Sequence[Path], data: Any, trust: bool) -> dict[Path, float]:
    """Return for each expert how often it answers as the others do together, among the classes of both.

    Experts that share no classes with others have no agreement, which leaves them out.
    """
    x = inputs_of(data, "data")
    found: dict[Path, tuple[tuple[Label, ...], Tensor]] = {}
    for file in files:
        teacher, own = teacher_of(load(file, None, None, None, None, trust, None))
        found[file] = own, answers(teacher, x).float().softmax(1).cpu()

    result = {}
    for file, (own, _) in found.items():
        others = [other for other in files if other != file]
        shared = [label for label in own if any(label in found[other][0] for other in others)]
        if len(shared) < 2:
            continue
        together = torch.zeros(len(x), len(shared))
        for other in others:
            theirs, p = found[other]
            for place, label in enumerate(shared):
                if label in theirs:
                    together[:, place] += p[:, theirs.index(label)]
        # Among the classes of both: what only one knows is no disagreement.
        mine = found[file][1][:, [own.index(label) for label in shared]]
        result[file] = float((mine.argmax(1) == together.argmax(1)).double().mean())
    return result
