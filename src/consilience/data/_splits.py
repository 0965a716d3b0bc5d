"""How one source becomes several: by class, by transformation, by client."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consilience.core.checks import positive, source_of_classes, whole_number
from consilience.core.errors import ConsilienceError
from consilience.core.losses import NONE
from consilience.core.params import key
from consilience.core.source import Source
from consilience.core.tree import one_tensor
from consilience.data._shares import apportion

Deal = Callable[[Tensor, str], Sequence[Tensor]]
"""deal(targets [N], which split) -> one index tensor per client."""

ATTEMPTS = 100
"""How often a random partition is drawn until every client has enough examples."""


@dataclass(frozen=True)
class Dealing:
    """Options that all random partitions share; see `consilience.data.dirichlet`."""

    seed: int = 0
    local_test: bool = False
    least: int = 1


# Splits into tasks.


def split_classes(
    source: Source, n: int, order: Sequence[int | str] | None, seed: int | None
) -> list[Source]:
    """See `consilience.data.split_classes`."""
    source_of_classes(source, "split_classes")
    whole_number(n=n)
    if n > len(source.classes):
        raise ConsilienceError(f"`n` must be at most the number of classes, {len(source.classes)}, got {n}.")

    # `tensor_split` gives the first parts one class more if they do not divide evenly.
    parts = []
    for own in torch.tensor(_ordered_classes(source, order, seed)).tensor_split(n):
        names = [source.labels[label][1] for label in own.tolist()]
        name = f"{source.name}/{'-'.join(names) if len(names) <= 5 else f'{names[0]}-to-{names[-1]}'}"
        examples = {}
        for part in ("train", "validation", "test"):
            every = getattr(source, part)
            examples[part] = every.select(torch.isin(every.targets().cpu(), own).nonzero().flatten())
        parts.append(replace(source, name=name, task=name, classes=tuple(own.tolist()), **examples))
    return parts


def _ordered_classes(source: Source, order: Sequence[int | str] | None, seed: int | None) -> list[int]:
    """Return the classes of a source in the given order, in a random one, or as declared."""
    if order is not None and seed is not None:
        raise ConsilienceError("got both `order` and `seed`; give the order of classes, or draw it.")
    classes = list(source.classes)
    if order is not None:
        # Unknown names become -1, which is no class, so that one check refuses all errors.
        numbers = {source.labels[label][1]: label for label in source.classes}
        classes = [numbers.get(label, -1) if isinstance(label, str) else int(label) for label in order]
        if sorted(classes) != sorted(source.classes):
            raise ConsilienceError(
                f"`order` must list every class of {source.name!r} once, got {list(order)}."
            )
    elif seed is not None:
        drawn = torch.randperm(len(classes), generator=key(seed, source.name, "classes"))
        classes = [classes[i] for i in drawn]
    return classes


def _inputs_alone(source: Source, what: str) -> None:
    """Refuse inputs of several parts, and targets at places that would have to move with the inputs."""
    one_tensor(source.train.first()[0], what)
    if source.places:
        raise ConsilienceError(
            f"{what} changes the inputs alone, got {source.name!r}, whose targets have places in them."
        )


def permute(source: Source, n: int, seed: int) -> list[Source]:
    """See `consilience.data.permute`."""
    whole_number(n=n)
    _inputs_alone(source, "permute")
    size = math.prod(_input_shape(source))
    parts = []
    for i in range(n):
        name = f"{source.name}/permuted-{i}"
        order = torch.randperm(size, generator=key(seed, source.name, "permute", i))
        parts.append(source.map(x=_permuted(order) if i else None, name=name, task=name))
    return parts


def _permuted(order: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that permutes all entries of each input."""
    return lambda x: x.flatten(1)[:, order.to(x.device)].view(x.shape)


def rotate(source: Source, angles: int | Sequence[float], side: int | None) -> list[Source]:
    """See `consilience.data.rotate`."""
    _inputs_alone(source, "rotate")
    degrees = _degrees(angles)
    shape = _input_shape(source)
    if side is None and len(shape) != 3:
        raise ConsilienceError(
            f"rotate needs images [N, C, H, W], got examples of shape {shape}; "
            "give `side` for flat square images."
        )

    if side is not None:
        whole_number(side=side)
        if len(shape) != 1 or shape[0] % (side * side):
            raise ConsilienceError(
                f"`side` must be that of flat square images [N, C*side*side], "
                f"got {side} and examples of shape {shape}."
            )

    parts = []
    for angle in degrees:
        name = f"{source.name}/rotated-{angle:g}"
        parts.append(source.map(x=_turned(angle, side) if angle % 360 else None, name=name, task=name))
    return parts


def _degrees(angles: int | Sequence[float]) -> Sequence[float]:
    """Return the angles in degrees, from their number or a list of them."""
    if isinstance(angles, int):
        whole_number(angles=angles)
        angles = [360 * i / angles for i in range(angles)]
    if not angles or any(isinstance(angle, bool | str) or not math.isfinite(angle) for angle in angles):
        raise ConsilienceError(f"`angles` must be a number of sources or finite degrees, got {angles!r}.")
    if len(set(angles)) != len(angles):
        raise ConsilienceError(f"`angles` must be different, got {list(angles)}.")
    return angles


def _turned(angle: float, side: int | None) -> Callable[[Tensor], Tensor]:
    """Return a function that turns images counter-clockwise.

    Output (u, v) is input at (u cos - v sin, u sin + v cos), in pixels from the centre.
    """
    from torch.nn.functional import affine_grid, grid_sample

    radians = math.radians(angle)
    cos, sin = math.cos(radians), math.sin(radians)

    def turn(x: Tensor) -> Tensor:
        if len(x) == 0:
            return x
        if not x.is_floating_point():
            raise ConsilienceError(f"rotate needs images of fractions, got {x.dtype}.")
        images = x if side is None else x.view(len(x), -1, side, side)
        height, width = images.shape[-2:]
        # Exact, where interpolation would blur.
        if height == width and angle % 90 == 0:
            return torch.rot90(images, int(angle // 90) % 4, (2, 3)).reshape(x.shape)

        # `affine_grid` measures both axes from -1 to 1, so that sines are scaled by the sides' ratio.
        theta = torch.tensor(
            [[cos, -sin * height / width, 0], [sin * width / height, cos, 0]], dtype=x.dtype, device=x.device
        )

        # In chunks: a grid takes as much memory as two channels of the images.
        turned = [
            grid_sample(
                chunk,
                affine_grid(theta.expand(len(chunk), 2, 3), list(chunk.shape), align_corners=False),
                align_corners=False,
            )
            for chunk in images.split(4096)
        ]
        return torch.cat(turned).view(x.shape)

    return turn


def _input_shape(source: Source) -> tuple[int, ...]:
    """Return the shape of one input."""
    return tuple(next(iter(source.train.batches([torch.tensor([0])])))[0].shape[1:])


# Partitions into clients. The parts of a source are dealt with keys of their own, so that the partition of
# the training examples does not depend on the number of validation or test examples.


def _partition(source: Source, deal: Deal, local_test: bool) -> list[Source]:
    """Deal a source to clients. They keep its classes and its task, and its test unless that is dealt too."""
    parts = {}
    for part in ("train", "validation", *(["test"] if local_test else [])):
        examples = getattr(source, part)
        parts[part] = [examples.select(index) for index in deal(examples.targets().cpu(), part)]
    # One task for all: heads and task labels are shared by the clients.
    task = source.task or source.name
    return [
        replace(
            source,
            name=f"{source.name}/client-{i}",
            task=task,
            **{part: own[i] for part, own in parts.items()},
        )
        for i in range(len(parts["train"]))
    ]


def _enough_examples(source: Source, pieces: int, each: int, what: str) -> None:
    """Refuse a partition into more pieces than there are training examples."""
    if pieces * each > len(source.train):
        raise ConsilienceError(
            f"{what} must not outnumber the training examples of {source.name!r}, "
            f"got {pieces * each} for {len(source.train)}."
        )


def dirichlet_shares(rows: int, columns: int, alpha: float, generator: torch.Generator) -> Tensor:
    """Draw shares [rows, columns] from Dirichlet(alpha 1).

    In logarithms, which never underflow: log G(a) = log G(a + 1) + log(U) / a for a Gamma variable G(a) and
    a uniform U.
    """
    # Torch has no public function that draws Gamma variables from a given generator.
    rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    log = (
        np.log(rng.standard_gamma(alpha + 1, (rows, columns)))
        + np.log1p(-rng.random((rows, columns))) / alpha
    )
    return torch.from_numpy(log).softmax(1)


def dirichlet(source: Source, clients: int, alpha: float, dealing: Dealing) -> list[Source]:
    """See `consilience.data.dirichlet`."""
    source_of_classes(source, "dirichlet")
    whole_number(clients=clients, least=dealing.least)
    positive(alpha=alpha)
    _enough_examples(source, clients, dealing.least, "clients x `least`")

    best = 0
    for attempt in range(ATTEMPTS):
        deal = _dirichlet_deal(source, clients, alpha, dealing.seed, attempt)
        smallest = min(len(index) for index in deal(source.train.targets().cpu(), "train"))
        if smallest >= dealing.least:
            return _partition(source, deal, dealing.local_test)
        best = max(best, smallest)
    raise ConsilienceError(
        f"every client must have at least {dealing.least} training examples, "
        f"got {best} for the smallest at best in {ATTEMPTS} draws "
        f"with `alpha={alpha}` and {clients} clients; raise `alpha` or take fewer clients."
    )


def _dirichlet_deal(source: Source, clients: int, alpha: float, seed: int, attempt: int) -> Deal:
    """Deal each class by shares drawn for this attempt."""
    generator = key(seed, source.name, "dirichlet", attempt)
    shares = dirichlet_shares(len(source.classes), clients, alpha, generator)

    def deal(targets: Tensor, part: str) -> list[Tensor]:
        generator = key(seed, source.name, "dirichlet", attempt, part)
        dealt: list[list[Tensor]] = [[] for _ in range(clients)]
        for label, share in zip(source.classes, shares, strict=True):
            index = (targets == label).nonzero().flatten()
            index = index[torch.randperm(len(index), generator=generator)]
            # Cuts of the cumulated shares are rounded, so that every example goes to exactly one client.
            cuts = (share.cumsum(0)[:-1] * len(index)).round().long().clamp(max=len(index))
            for own, piece in zip(dealt, index.tensor_split(cuts), strict=True):
                own.append(piece)
        _deal_others(dealt, targets, generator)
        return [torch.cat(own).sort().values for own in dealt]

    return deal


def _deal_others(dealt: list[list[Tensor]], targets: Tensor, generator: torch.Generator) -> None:
    """Add the examples without a class to what clients were dealt, evenly."""
    index = (targets == NONE).nonzero().flatten()
    # Nothing is drawn for data that has all its targets.
    if len(index):
        index = index[torch.randperm(len(index), generator=generator)]
        for own, piece in zip(dealt, index.tensor_split(len(dealt)), strict=True):
            own.append(piece)


def iid(source: Source, clients: int, dealing: Dealing) -> list[Source]:
    """See `consilience.data.iid`."""
    whole_number(clients=clients)
    _enough_examples(source, clients, 1, "clients")

    def deal(targets: Tensor, part: str) -> list[Tensor]:
        order = torch.randperm(len(targets), generator=key(dealing.seed, source.name, "iid", part))
        return [index.sort().values for index in order.tensor_split(clients)]

    return _partition(source, deal, dealing.local_test)


@dataclass(frozen=True)
class Sizes:
    """How the sizes of clients are distributed; see `consilience.data.quantity_skew`."""

    power: float = 1.5
    sigma: float | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.sigma is not None and self.alpha is not None:
            raise ConsilienceError(
                f"got both `sigma={self.sigma}` and `alpha={self.alpha}`; give one of them."
            )
        positive(**{self.name: self.value})

    @property
    def name(self) -> str:
        """The parameter in use."""
        return "sigma" if self.sigma is not None else "alpha" if self.alpha is not None else "power"

    @property
    def value(self) -> float:
        """The value of the parameter in use."""
        return getattr(self, self.name)  # type: ignore[no-any-return]

    @property
    def random(self) -> bool:
        """Whether sizes are drawn."""
        return self.name != "power"

    def weights(self, clients: int, generator: torch.Generator) -> Tensor:
        """Return the relative sizes [clients]."""
        if self.sigma is not None:
            return (self.sigma * torch.randn(clients, generator=generator, dtype=torch.float64)).softmax(0)
        if self.alpha is not None:
            return dirichlet_shares(1, clients, self.alpha, generator)[0]
        return (torch.arange(clients).double() + 1) ** -self.power


def quantity_skew(source: Source, clients: int, sizes: Sizes, dealing: Dealing) -> list[Source]:
    """See `consilience.data.quantity_skew`."""
    whole_number(clients=clients, least=dealing.least)
    _enough_examples(source, clients, dealing.least, "clients x `least`")
    weights = _drawn_sizes(source, clients, sizes, dealing)

    def deal(targets: Tensor, part: str) -> list[Tensor]:
        order = torch.randperm(len(targets), generator=key(dealing.seed, source.name, "quantity", part))
        return [index.sort().values for index in order.split(apportion(weights, len(targets)).tolist())]

    return _partition(source, deal, dealing.local_test)


def _drawn_sizes(source: Source, clients: int, sizes: Sizes, dealing: Dealing) -> Tensor:
    """Draw relative sizes [clients] with which every client has enough training examples."""
    best = 0

    # The power law draws nothing, so that a second attempt would find the same.
    for attempt in range(ATTEMPTS if sizes.random else 1):
        generator = key(dealing.seed, source.name, "quantity", sizes.name, attempt)
        weights = sizes.weights(clients, generator)
        smallest = int(apportion(weights, len(source.train)).min())
        if smallest >= dealing.least:
            return weights
        best = max(best, smallest)

    draws = f" at best in {ATTEMPTS} draws" if sizes.random else ""
    raise ConsilienceError(
        f"every client must have at least {dealing.least} training examples, "
        f"got {best} for the smallest{draws} with `{sizes.name}={sizes.value}` and {clients} clients; "
        f"{'raise' if sizes.name == 'alpha' else 'lower'} `{sizes.name}` or take fewer clients."
    )


def label_sets(
    source: Source, clients: int, classes: int | Sequence[Sequence[int | str]], dealing: Dealing
) -> list[Source]:
    """See `consilience.data.label_sets`."""
    source_of_classes(source, "label_sets")
    whole_number(clients=clients)
    if isinstance(classes, int):
        sets = _drawn_sets(source, clients, classes, dealing.seed)
    else:
        sets = _given_sets(source, clients, classes)

    def deal(targets: Tensor, part: str) -> list[Tensor]:
        dealt: list[list[Tensor]] = [[] for _ in range(clients)]
        for label in source.classes:
            holders = [i for i, own in enumerate(sets) if label in own]
            generator = key(dealing.seed, source.name, "label sets", part, label)

            # A random order of clients decides who takes the examples that do not divide evenly.
            holders = [holders[i] for i in torch.randperm(len(holders), generator=generator).tolist()]
            index = (targets == label).nonzero().flatten()
            index = index[torch.randperm(len(index), generator=generator)]
            for i, piece in zip(holders, index.tensor_split(max(len(holders), 1)), strict=False):
                dealt[i].append(piece)
        _deal_others(dealt, targets, key(dealing.seed, source.name, "label sets", part, NONE))
        return [torch.cat(own).sort().values for own in dealt]

    parts = _partition(source, deal, dealing.local_test)
    return [replace(part, classes=tuple(own)) for part, own in zip(parts, sets, strict=True)]


def _drawn_sets(source: Source, clients: int, each: int, seed: int) -> list[list[int]]:
    """Draw `each` different classes per client; no class is held by two clients more than another.

    Clients choose in turn, the classes with the fewest clients first.
    """
    whole_number(classes=each)
    if each > len(source.classes) or clients * each < len(source.classes):
        raise ConsilienceError(
            f"`classes` must be at most {len(source.classes)}, and `clients` x `classes` at least that, "
            f"so that every class has a client; got {clients} clients with {each}."
        )
    generator = key(seed, source.name, "label sets")
    classes = source.classes
    held = dict.fromkeys(classes, 0)
    sets = []
    for _ in range(clients):
        order = [classes[i] for i in torch.randperm(len(classes), generator=generator).tolist()]
        own = sorted(order, key=held.__getitem__)[:each]
        for label in own:
            held[label] += 1
        sets.append(sorted(own))
    return sets


def _given_sets(source: Source, clients: int, classes: Sequence[Sequence[int | str]]) -> list[list[int]]:
    """Return the classes of each client as numbers."""
    numbers: dict[int | str, int] = {label: label for label in source.classes}
    numbers |= {source.labels[label][1]: label for label in source.classes}
    unknown = [label for own in classes for label in own if label not in numbers]
    if len(classes) != clients or unknown or not all(len(own) for own in classes):
        got = f"{len(classes)} sets"
        if unknown:
            got = f"{unknown[0]!r}"
        elif len(classes) == clients:
            got += ", one of them empty"
        raise ConsilienceError(
            f"`classes` must be {clients} lists of classes of {source.name!r}, one per client, got {got}."
        )
    return [sorted({numbers[label] for label in own}) for own in classes]


def natural(source: Source, users: Any, test_users: Any, least: int) -> list[Source]:
    """See `consilience.data.natural`."""
    whole_number(least=least)
    train, validation = len(source.train), len(source.validation)
    column = _column(
        users, train + validation, "users", "training example, and then for each validation example"
    )
    columns = {"train": column[:train], "validation": column[train:]}
    if test_users is not None:
        columns["test"] = _column(test_users, len(source.test), "test_users", "test example")

    # Users with validation examples only are counted too, with 0.
    counts = dict.fromkeys(column, 0)
    for user in columns["train"]:
        counts[user] += 1
    # Numbers before names: the two cannot be compared.
    kept = sorted((u for u, count in counts.items() if count >= least), key=lambda u: (isinstance(u, str), u))
    if not kept:
        raise ConsilienceError(
            f"a user must have at least {least} training examples, got {max(counts.values())} at most."
        )

    rows: dict[str, dict[Any, list[int]]] = {part: {user: [] for user in kept} for part in columns}
    for part, of_part in columns.items():
        for i, user in enumerate(of_part):
            if user in rows[part]:
                rows[part][user].append(i)
    dealt = {part: [torch.tensor(own[user], dtype=torch.long) for user in kept] for part, own in rows.items()}
    parts = _partition(source, lambda targets, part: dealt[part], test_users is not None)
    return [replace(part, name=f"{source.name}/{user}") for part, user in zip(parts, kept, strict=True)]


def _column(values: Any, count: int, name: str, each: str) -> list[Any]:
    """Return a list of names or whole numbers, one per example."""
    found = []
    if hasattr(values, "tolist"):
        found = values.tolist()
    elif isinstance(values, Sequence):
        found = list(values)
    if len(found) != count or isinstance(values, str) or any(not isinstance(u, int | str) for u in found):
        raise ConsilienceError(
            f"`{name}` must be a name or a whole number for each {each}, {count} in all, "
            f"got {len(found)} values."
        )
    return found


def shards(source: Source, clients: int, shards_per_client: int, dealing: Dealing) -> list[Source]:
    """See `consilience.data.shards`."""
    source_of_classes(source, "shards")
    whole_number(clients=clients, shards_per_client=shards_per_client)
    total = clients * shards_per_client
    _enough_examples(source, total, 1, "shards")
    drawn = torch.randperm(total, generator=key(dealing.seed, source.name, "shards"))
    shards_of = drawn.view(clients, shards_per_client).tolist()

    def deal(targets: Tensor, part: str) -> list[Tensor]:
        # Shuffled first, so that the cuts inside a class fall at random.
        order = torch.randperm(len(targets), generator=key(dealing.seed, source.name, "shards", part))
        pieces = order[targets[order].argsort(stable=True)].tensor_split(total)
        return [torch.cat([pieces[shard] for shard in own]).sort().values for own in shards_of]

    return _partition(source, deal, dealing.local_test)


def streams(sources: Sequence[Source], clients: int) -> list[list[Source]]:
    """See `consilience.data.streams`."""
    whole_number(clients=clients)
    if clients > len(sources):
        raise ConsilienceError(
            f"every client must have a source, got {clients} clients and {len(sources)} sources."
        )
    return [list(sources[i::clients]) for i in range(clients)]
