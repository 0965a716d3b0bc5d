"""How one source becomes several: by class, by transformation, by client."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

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


def split_classes(source: Source, n: int, order: Sequence[int | str] | None, seed: int | None) -> list[Source]:
    """See `consilience.data.split_classes`."""
    _of_classes(source, "split_classes")
    _whole(n=n)
    if n > len(source.classes):
        raise ConsilienceError(f"`n` should be at most the number of classes. Found `n = {n}` and {len(source.classes)} classes.")
    if order is not None and seed is not None:
        raise ConsilienceError("classes should be in a given `order` or in one drawn with `seed`. Found both.")
    classes = list(source.classes)
    if order is not None:
        numbers = {source.labels[c][1]: c for c in source.classes}
        classes = [numbers.get(c, -1) if isinstance(c, str) else int(c) for c in order]
        if sorted(classes) != sorted(source.classes):
            raise ConsilienceError(f"`order` should list every class of {source.name!r} once. Found {list(order)}.")
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
            grid_sample(c, affine_grid(theta.expand(len(c), 2, 3), list(c.shape), align_corners=False), align_corners=False)
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
        replace(source, name=f"{source.name}/client-{i}", task=task, **{part: own[i] for part, own in parts.items()})
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
    log = np.log(rng.standard_gamma(alpha + 1, (rows, columns))) + np.log1p(-rng.random((rows, columns))) / alpha
    return torch.from_numpy(log).softmax(1)


def dirichlet(source: Source, clients: int, alpha: float, seed: int, local_test: bool, least: int) -> list[Source]:
    """See `consilience.data.dirichlet`."""
    _of_classes(source, "dirichlet")
    _whole(clients=clients, least=least)
    _positive(alpha=alpha)
    _fits(source, clients, least, "clients x `least`")
    best = 0
    for attempt in range(100):
        shares = _gamma_shares(len(source.classes), clients, alpha, key(seed, source.name, "dirichlet", attempt))

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


def quantity_skew(source: Source, n: int, power: float, seed: int, local_test: bool, least: int) -> list[Source]:
    """See `consilience.data.quantity_skew`."""
    _whole(n=n, least=least)
    _positive(power=power)
    _fits(source, n, least, "clients x `least`")
    weights = (torch.arange(n).double() + 1) ** -power

    def deal(y: Tensor, part: str) -> list[Tensor]:
        order = torch.randperm(len(y), generator=key(seed, source.name, "quantity", part))
        return [i.sort().values for i in order.split(apportion(weights, len(y)).tolist())]

    smallest = int(apportion(weights, len(source.train)).min())
    if smallest < least:
        raise ConsilienceError(
            f"every client should have at least {least} training examples; lower `power` or take fewer clients. "
            f"Found one with {smallest} with `power = {power}` and {n} clients."
        )
    return _clients(source, deal, local_test)


def shards(source: Source, clients: int, shards_per_client: int, seed: int, local_test: bool) -> list[Source]:
    """See `consilience.data.shards`."""
    _of_classes(source, "shards")
    _whole(clients=clients, shards_per_client=shards_per_client)
    total = clients * shards_per_client
    _fits(source, total, 1, "shards")
    owner = torch.randperm(total, generator=key(seed, source.name, "shards")).view(clients, shards_per_client).tolist()

    def deal(y: Tensor, part: str) -> list[Tensor]:
        order = torch.randperm(len(y), generator=key(seed, source.name, "shards", part))
        pieces = order[y[order].argsort(stable=True)].tensor_split(total)
        return [torch.cat([pieces[s] for s in own]).sort().values for own in owner]

    return _clients(source, deal, local_test)


def streams(sources: Sequence[Source], clients: int) -> list[list[Source]]:
    """See `consilience.data.streams`."""
    _whole(clients=clients)
    if clients > len(sources):
        raise ConsilienceError(f"every client should have a source. Found {clients} clients and {len(sources)} sources.")
    return [list(sources[i::clients]) for i in range(clients)]
