"""How one source becomes several: by class, by transformation, by client."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError
from consilience.core.params import key
from consilience.core.source import Source
from consilience.data._shares import apportion

Deal = Callable[[Tensor, str], Sequence[Tensor]]
"""deal(targets [N], which split) -> one index tensor for each client."""


def _whole(low: int = 1, **values: object) -> None:
    for name, v in values.items():
        if isinstance(v, bool) or not isinstance(v, int) or v < low:
            raise ConsilienceError(f"`{name}` should be a whole number >= {low}. Found `{name} = {v!r}`.")


def _positive(**values: float) -> None:
    for name, v in values.items():
        if not isinstance(v, (int, float)) or not 0 < v < math.inf:
            raise ConsilienceError(f"`{name}` should be positive and finite. Found `{name} = {v!r}`.")


def _of_classes(source: Source, what: str) -> None:
    if source.kind != "class":
        raise ConsilienceError(f"{what} should have a source of classes. Found values in {source.name!r}.")


# ---------------------------------------------------------------------------------------------------- tasks


def split_classes(
    source: Source, n: int, order: Sequence[int | str] | None, seed: int | None
) -> list[Source]:
    """See `consilience.data.split_classes`."""
    _of_classes(source, "split_classes")
    _whole(n=n)
    if n > len(source.classes):
        raise ConsilienceError(
            f"`n` should be at most the number of classes. Found `n = {n}` and {len(source.classes)} classes."
        )
    if order is not None and seed is not None:
        raise ConsilienceError(
            "classes should be in a given `order` or in one drawn with `seed`. Found both."
        )
    classes = list(source.classes)
    if order is not None:
        numbers = {source.labels[c][1]: c for c in source.classes}
        classes = [numbers.get(c, -1) if isinstance(c, str) else int(c) for c in order]
        if sorted(classes) != sorted(source.classes):
            raise ConsilienceError(
                f"`order` should list every class of {source.name!r} once. Found {list(order)}."
            )
    elif seed is not None:
        turn = torch.randperm(len(classes), generator=key(seed, source.name, "classes"))
        classes = [classes[i] for i in turn]
    found = []
    for own in torch.tensor(classes).tensor_split(n):
        names = [source.labels[c][1] for c in own.tolist()]
        name = f"{source.name}/{'-'.join(names) if len(names) <= 5 else f'{names[0]}-to-{names[-1]}'}"
        examples = {}
        for part in ("train", "validation", "test"):
            these = getattr(source, part)
            of = these.targets()
            examples[part] = these.select(torch.isin(of.cpu(), own).nonzero().flatten())
        found.append(replace(source, name=name, task=name, classes=tuple(own.tolist()), **examples))
    return found


def permute(source: Source, n: int, seed: int) -> list[Source]:
    """See `consilience.data.permute`."""
    _whole(n=n)
    size = math.prod(_shape(source))
    found = []
    for i in range(n):
        name = f"{source.name}/permuted-{i}"
        order = torch.randperm(size, generator=key(seed, source.name, "permute", i))
        found.append(source.map(x=_permuted(order) if i else None, name=name, task=name))
    return found


def _permuted(order: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x.flatten(1)[:, order.to(x.device)].view(x.shape)


def rotate(source: Source, angles: int | Sequence[float], side: int | None) -> list[Source]:
    """See `consilience.data.rotate`."""
    if isinstance(angles, int):
        _whole(angles=angles)
        angles = [360 * i / angles for i in range(angles)]
    if not angles or any(isinstance(a, (bool, str)) or not math.isfinite(a) for a in angles):
        raise ConsilienceError(f"`angles` should be a number of sources or finite degrees. Found {angles!r}.")
    if len(set(angles)) != len(angles):
        raise ConsilienceError(f"`angles` should be different. Found {list(angles)}.")
    shape = _shape(source)
    if side is None and len(shape) != 3:
        raise ConsilienceError(
            f"rotate should have images [N, C, H, W], or `side` for flat square ones. Found examples of shape {shape}."
        )
    if side is not None:
        _whole(side=side)
        if len(shape) != 1 or shape[0] % (side * side):
            raise ConsilienceError(
                f"`side` should be that of flat square images [N, C*side*side]. Found `side = {side}` and shape {shape}."
            )
    found = []
    for a in angles:
        name = f"{source.name}/rotated-{a:g}"
        found.append(source.map(x=_turned(a, side) if a % 360 else None, name=name, task=name))
    return found


def _turned(angle: float, side: int | None) -> Callable[[Tensor], Tensor]:
    """Images turned counter-clockwise: output (u, v) is input at (u cos - v sin, u sin + v cos) in pixels from the centre."""
    from torch.nn.functional import affine_grid, grid_sample

    a = math.radians(angle)
    cos, sin = math.cos(a), math.sin(a)

    def turn(x: Tensor) -> Tensor:
        if len(x) == 0:
            return x
        if not x.is_floating_point():
            raise ConsilienceError(f"rotate should have images of fractions. Found {x.dtype}.")
        image = x if side is None else x.view(len(x), -1, side, side)
        h, w = image.shape[-2:]
        if h == w and angle % 90 == 0:
            return torch.rot90(image, int(angle // 90) % 4, (2, 3)).reshape(x.shape)
        theta = torch.tensor([[cos, -sin * h / w, 0], [sin * w / h, cos, 0]], dtype=x.dtype, device=x.device)
        turned = [
            grid_sample(
                c,
                affine_grid(theta.expand(len(c), 2, 3), list(c.shape), align_corners=False),
                align_corners=False,
            )
            for c in image.split(4096)
        ]
        return torch.cat(turned).view(x.shape)

    return turn


def _shape(source: Source) -> tuple[int, ...]:
    """The shape of one input."""
    return tuple(next(iter(source.train.batches([torch.tensor([0])])))[0].shape[1:])


# ---------------------------------------------------------------------------------------------------- clients


def _clients(source: Source, deal: Deal, local_test: bool) -> list[Source]:
    """The clients of a source: they keep its classes, its task, and its test, unless that is dealt too."""
    parts = {}
    for part in ("train", "validation", *(["test"] if local_test else [])):
        these = getattr(source, part)
        parts[part] = [these.select(index) for index in deal(these.targets().cpu(), part)]
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


def _fits(source: Source, n: int, each: int, what: str) -> None:
    if n * each > len(source.train):
        raise ConsilienceError(
            f"{what} should not outnumber training examples. Found {n * each} and {len(source.train)} of {source.name!r}."
        )


def _gamma_shares(rows: int, columns: int, alpha: float, generator: torch.Generator) -> Tensor:
    """Draws [rows, columns] from Dirichlet(alpha 1), in logarithms: log G(a) = log G(a + 1) + log(U) / a never underflows."""
    rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    log = (
        np.log(rng.standard_gamma(alpha + 1, (rows, columns)))
        + np.log1p(-rng.random((rows, columns))) / alpha
    )
    return torch.from_numpy(log).softmax(1)


def dirichlet(
    source: Source, clients: int, alpha: float, seed: int, local_test: bool, least: int
) -> list[Source]:
    """See `consilience.data.dirichlet`."""
    _of_classes(source, "dirichlet")
    _whole(clients=clients, least=least)
    _positive(alpha=alpha)
    _fits(source, clients, least, "clients x `least`")
    best = 0
    for attempt in range(100):
        shares = _gamma_shares(
            len(source.classes), clients, alpha, key(seed, source.name, "dirichlet", attempt)
        )

        def deal(y: Tensor, part: str, shares: Tensor = shares, attempt: int = attempt) -> list[Tensor]:
            generator = key(seed, source.name, "dirichlet", attempt, part)
            own: list[list[Tensor]] = [[] for _ in range(clients)]
            for c, p in zip(source.classes, shares, strict=True):
                index = (y == c).nonzero().flatten()
                index = index[torch.randperm(len(index), generator=generator)]
                cuts = (p.cumsum(0)[:-1] * len(index)).round().long().clamp(max=len(index))
                for mine, piece in zip(own, index.tensor_split(cuts), strict=True):
                    mine.append(piece)
            return [torch.cat(mine).sort().values for mine in own]

        smallest = min(len(i) for i in deal(source.train.targets().cpu(), "train"))
        if smallest >= least:
            return _clients(source, deal, local_test)
        best = max(best, smallest)
    raise ConsilienceError(
        f"every client should have at least {least} training examples; raise `alpha` or take fewer clients. "
        f"Found one with {best} at best in 100 draws with `alpha = {alpha}` and {clients} clients."
    )


def iid(source: Source, n: int, seed: int, local_test: bool) -> list[Source]:
    """See `consilience.data.iid`."""
    _whole(n=n)
    _fits(source, n, 1, "clients")

    def deal(y: Tensor, part: str) -> list[Tensor]:
        order = torch.randperm(len(y), generator=key(seed, source.name, "iid", part))
        return [i.sort().values for i in order.tensor_split(n)]

    return _clients(source, deal, local_test)


def quantity_skew(
    source: Source,
    n: int,
    power: float,
    seed: int,
    local_test: bool,
    least: int,
    sigma: float | None,
    alpha: float | None,
) -> list[Source]:
    """See `consilience.data.quantity_skew`."""
    _whole(n=n, least=least)
    name, value = (
        ("sigma", sigma) if sigma is not None else ("alpha", alpha) if alpha is not None else ("power", power)
    )
    if sigma is not None and alpha is not None:
        raise ConsilienceError(f"give `sigma` or `alpha`. Found both: {sigma} and {alpha}.")
    _positive(**{name: value})
    _fits(source, n, least, "clients x `least`")

    def sizes(attempt: int) -> Tensor:
        generator = key(seed, source.name, "quantity", name, attempt)
        if sigma is not None:
            return (sigma * torch.randn(n, generator=generator, dtype=torch.float64)).softmax(0)
        if alpha is not None:
            return _gamma_shares(1, n, alpha, generator)[0]
        return (torch.arange(n).double() + 1) ** -power

    best = 0
    for attempt in range(1 if name == "power" else 100):
        weights = sizes(attempt)
        smallest = int(apportion(weights, len(source.train)).min())
        if smallest >= least:
            break
        best = max(best, smallest)
    else:
        lower = "raise" if name == "alpha" else "lower"
        draws = "" if name == "power" else " at best in 100 draws"
        raise ConsilienceError(
            f"every client should have at least {least} training examples; {lower} `{name}` or take fewer clients. "
            f"Found one with {best}{draws} with `{name} = {value}` and {n} clients."
        )

    def deal(y: Tensor, part: str) -> list[Tensor]:
        order = torch.randperm(len(y), generator=key(seed, source.name, "quantity", part))
        return [i.sort().values for i in order.split(apportion(weights, len(y)).tolist())]

    return _clients(source, deal, local_test)


def label_sets(
    source: Source, clients: int, classes: int | Sequence[Sequence[int | str]], seed: int, local_test: bool
) -> list[Source]:
    """See `consilience.data.label_sets`."""
    _of_classes(source, "label_sets")
    _whole(clients=clients)
    if isinstance(classes, int):
        _whole(classes=classes)
        if classes > len(source.classes) or clients * classes < len(source.classes):
            raise ConsilienceError(
                f"`classes` should be at most {len(source.classes)}, and `clients` x `classes` reach them all. "
                f"Found {clients} clients with {classes}."
            )
        own = _balanced(source.classes, clients, classes, key(seed, source.name, "label sets"))
    else:
        numbers: dict[int | str, int] = {c: c for c in source.classes}
        numbers |= {source.labels[c][1]: c for c in source.classes}
        unknown = [c for mine in classes for c in mine if c not in numbers]
        if len(classes) != clients or unknown or not all(len(mine) for mine in classes):
            found = (
                f"{unknown[0]!r}"
                if unknown
                else f"{len(classes)} sets, one empty"
                if len(classes) == clients
                else len(classes)
            )
            raise ConsilienceError(
                f"`classes` should be {clients} lists of classes of {source.name!r}, one a client. Found {found}."
            )
        own = [sorted({numbers[c] for c in mine}) for mine in classes]

    def deal(y: Tensor, part: str) -> list[Tensor]:
        dealt: list[list[Tensor]] = [[] for _ in range(clients)]
        for c in source.classes:
            owners = [i for i, mine in enumerate(own) if c in mine]
            generator = key(seed, source.name, "label sets", part, c)
            owners = [owners[i] for i in torch.randperm(len(owners), generator=generator).tolist()]
            index = (y == c).nonzero().flatten()
            index = index[torch.randperm(len(index), generator=generator)]
            for i, piece in zip(owners, index.tensor_split(max(len(owners), 1)), strict=False):
                dealt[i].append(piece)
        return [torch.cat(mine).sort().values for mine in dealt]

    return [
        replace(s, classes=tuple(mine))
        for s, mine in zip(_clients(source, deal, local_test), own, strict=True)
    ]


def _balanced(classes: Sequence[int], clients: int, each: int, generator: torch.Generator) -> list[list[int]]:
    """`each` different classes for each client; of two classes neither has over one owner more."""
    owners = dict.fromkeys(classes, 0)
    found = []
    for _ in range(clients):
        order = [classes[i] for i in torch.randperm(len(classes), generator=generator).tolist()]
        mine = sorted(order, key=owners.__getitem__)[:each]
        for c in mine:
            owners[c] += 1
        found.append(sorted(mine))
    return found


def natural(source: Source, users: Any, test_users: Any, least: int) -> list[Source]:
    """See `consilience.data.natural`."""
    _whole(least=least)
    n, m = len(source.train), len(source.validation)
    of = _column(users, n + m, "users", "training example, and after them for each validation example")
    parts = {"train": of[:n], "validation": of[n:]}
    if test_users is not None:
        parts["test"] = _column(test_users, len(source.test), "test_users", "test example")
    count = {u: 0 for u in dict.fromkeys(of)}
    for u in of[:n]:
        count[u] += 1
    kept = sorted((u for u, c in count.items() if c >= least), key=lambda u: (isinstance(u, str), u))
    if not kept:
        raise ConsilienceError(
            f"a user should have at least {least} training examples. Found {max(count.values())} at most."
        )
    where: dict[str, dict[Any, list[int]]] = {part: {u: [] for u in kept} for part in parts}
    for part, column in parts.items():
        for i, u in enumerate(column):
            if u in where[part]:
                where[part][u].append(i)
    dealt = {part: [torch.tensor(own[u], dtype=torch.long) for u in kept] for part, own in where.items()}
    made = _clients(source, lambda y, part: dealt[part], test_users is not None)
    return [replace(s, name=f"{source.name}/{u}") for s, u in zip(made, kept, strict=True)]


def _column(values: Any, count: int, name: str, each: str) -> list[Any]:
    """A list of names or whole numbers, one for each example."""
    found = (
        values.tolist() if hasattr(values, "tolist") else list(values) if isinstance(values, Sequence) else []
    )
    if len(found) != count or isinstance(values, str) or any(not isinstance(u, int | str) for u in found):
        raise ConsilienceError(
            f"`{name}` should be a name or number for each {each}: {count}. Found {len(found)}."
        )
    return found


def shards(source: Source, clients: int, shards_per_client: int, seed: int, local_test: bool) -> list[Source]:
    """See `consilience.data.shards`."""
    _of_classes(source, "shards")
    _whole(clients=clients, shards_per_client=shards_per_client)
    total = clients * shards_per_client
    _fits(source, total, 1, "shards")
    owner = (
        torch.randperm(total, generator=key(seed, source.name, "shards"))
        .view(clients, shards_per_client)
        .tolist()
    )

    def deal(y: Tensor, part: str) -> list[Tensor]:
        order = torch.randperm(len(y), generator=key(seed, source.name, "shards", part))
        pieces = order[y[order].argsort(stable=True)].tensor_split(total)
        return [torch.cat([pieces[s] for s in own]).sort().values for own in owner]

    return _clients(source, deal, local_test)


def streams(sources: Sequence[Source], clients: int) -> list[list[Source]]:
    """See `consilience.data.streams`."""
    _whole(clients=clients)
    if clients > len(sources):
        raise ConsilienceError(
            f"every client should have a source. Found {clients} clients and {len(sources)} sources."
        )
    return [list(sources[i::clients]) for i in range(clients)]
