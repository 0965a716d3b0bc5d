"""The command `consilience choose`: whether combining trained models pays, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consilience.cli.build import aggregator_of, listed, model_of, schedule_of
from consilience.cli.catalogue import resolve
from consilience.cli.options import (
    Order,
    Part,
    check_options,
    order_of,
    parts_of,
    read,
    refuse_renamed,
    take_choice,
)
from consilience.core.errors import ConsilienceError
from consilience.core.names import clean

if TYPE_CHECKING:
    from consilience.core.aggregator import Aggregator
    from consilience.core.source import Source


@dataclass(frozen=True)
class ChooseOptions:
    """Options of the choice. Half of each test part chooses, the other half reports.

    Args:
        aggregators: merges to try, as in ties,dare; none tries ties, dare and, for two experts, slerp.
        labels: whether targets may be read; else answers are compared with those of the ensemble of experts.
        distil: also train the average on the mean answer of all experts, on the training inputs.
        budget: mixtures that an optimiser may try for each kind of merge, after a grid.
        seed: of all random draws; it also deals test examples into those that choose ("validation") and those
            that report ("test").
        out: a file for the results: .html for a page that opens offline, else JSON.
    """

    aggregators: str | None = None
    labels: bool = True
    distil: bool = False
    budget: int = 40
    seed: int = 0
    out: str | None = None


DEFAULTS = {"data": "digits", "split": "none", "model": "auto"}
# No expert is trained here, so the setting's `fraction` of the training steps would have no effect.
NOT_OPTIONS = ("sources", "experts", "base", "fraction")


def choose(argv: Sequence[str]) -> int:
    """Judge experts, merges, an ensemble and routing on one half of each test part, and report on the other.

    Test parts are halved because the experts may have been trained on all other examples.
    """
    order, words = understand_choose(argv)
    if order is None:
        return 0
    options = ChooseOptions(**order.options(order.parts[-1]))
    if len(words) < 2:
        got = ", ".join(words) or "neither"
        raise ConsilienceError(f"`consilience choose` needs a base and experts, got {got}.")
    if options.out and Path(options.out).is_dir():
        raise ConsilienceError(f"`--out` must be a file, but {options.out} is a folder.")
    tried = None if options.aggregators is None else aggregators_of(options.aggregators)

    from consilience.api import default_model
    from consilience.core.params import write_json
    from consilience.merging._choose import choose as judge
    from consilience.merging._diagnose import named
    from consilience.methods import average

    # Checkpoints are read before the data, so that a wrong path costs no time.
    base = checkpoint_of(words[0])
    experts = [checkpoint_of(word, base) for word in words[1:]]
    by_name = dict(zip(named(words[1:]), experts, strict=True))
    schedule = schedule_of(order)
    model = model_of(order, schedule) or default_model(schedule, average())

    with progress_line() as progress:
        choice = judge(
            model,
            base,
            by_name,
            halved(schedule.sources, options.seed),
            tried,
            labels=options.labels,
            distil=options.distil,
            scenario=order.values["setting.scenario"],
            budget=options.budget,
            seed=options.seed,
            progress=progress,
        )
    print(choice.table())
    if options.out:
        if options.out.endswith(".html"):
            choice.report(options.out)
        else:
            write_json(Path(options.out), choice.to_json())
        print(f"wrote {options.out}")
    return 0


@contextmanager
def progress_line() -> Iterator[Callable[[str], object] | None]:
    """Give a callback that shows what is being judged; None where stderr is no terminal."""
    from rich.console import Console
    from rich.text import Text

    # stdout has the result, which may go to a file.
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    with console.status("reading data") as status:
        # As text, since names may have brackets, which would be markup.
        yield lambda text: status.update(Text(clean(text)))


def understand_choose(argv: Sequence[str]) -> tuple[Order | None, list[str]]:
    """Check the options, and read the paths of the models; None where help was asked for and printed."""
    given, words = read(argv)
    helping = given.pop("help", None) is not None
    if not given.get("data") and not helping:
        raise ConsilienceError("`--data` must be a folder of sources, or a name of the catalogue.")
    # --help needs no data, and shows the options of the digits.
    names = {key: take_choice(given, key, usual, helping) for key, usual in DEFAULTS.items()}

    parts = parts_of_choose(names)
    options = {key: parameter for part in parts for key, parameter in part.options().items()}
    refuse_renamed("choose", given, options)
    check_options("choose", given, [*options, *names], helping)
    return order_of("choose", parts, options, given, names, helping), words


def parts_of_choose(names: Mapping[str, str]) -> list[Part]:
    """List the parts that have options: data, split, model, the setting `merging`, and the choice itself."""
    # A folder is read by the function that fits it, so that its options are checked as those of a data set.
    folder = Path(names["data"])
    if folder.is_dir():
        data = [Part("data", "data", folder.name, sources_in(folder))]
    else:
        data = parts_of("data", names["data"])
    return [
        *data,
        *parts_of("split", names["split"]),
        *parts_of("model", names["model"]),
        Part("setting", "setting", "merging", resolve("setting", "merging"), NOT_OPTIONS, "sources"),
        Part("", "", "choose", ChooseOptions),
    ]


def sources_in(folder: Path) -> Callable[..., list[Source]]:
    """Make a function that reads the sources of a folder, with the options of `--data`."""

    def sources(
        flat: bool = False,
        limit: int | None = None,
        size: int | None = None,
        grey: bool = False,
        space: str | None = None,
    ) -> list[Source]:
        """Read the sources of a folder: its .npz files, or its subfolders of images by class.

        Args:
            flat: inputs are vectors (.npz).
            limit: number of training examples per source (.npz); none is all.
            size: height and width that images are resized to (folders).
            grey: one channel (folders).
            space: a label space for all sources, where classes with the same name are the same class; none is
                one each.
        """
        from consilience import data

        visible = sorted(path.resolve() for path in folder.iterdir() if not path.name.startswith("."))
        files = [path for path in visible if path.suffix == ".npz"]
        folders = [path for path in visible if path.is_dir()]
        if not files and not folders:
            raise ConsilienceError(
                f"`--data` must hold one .npz file or one folder per source, but {folder} has neither."
            )
        if files:
            return [data.npz(path, flat=flat, limit=limit, space=space) for path in files]
        return [data.folder(path, size=size, grey=grey, space=space) for path in folders]

    return sources


def checkpoint_of(word: str, base: Any = None) -> Any:
    """Find a checkpoint: a path (of an adapter, with its base), the tensors of a torch file or of a run."""
    from consilience.loop.session import saved_agents
    from consilience.merging._files import loaded, opened

    path = Path(word)
    read = loaded(path)
    if read is not path:
        return read
    if not (path / "checkpoint" / "index.json").exists():
        # Opening it refuses what is no checkpoint before any work is done.
        opened(path, None if base is None else opened(base))
        return path

    # A run of several agents would need a choice among them.
    agents = saved_agents(path, None if base is None else opened(base).whole)
    if len(agents) != 1:
        got = ", ".join(agents) or "none"
        raise ConsilienceError(
            f"the folder of a run must hold the weights of one agent, but {word} has {got}."
        )
    (state,) = agents.values()
    return {**state.params, **state.buffers}


def halved(sources: Sequence[Source], seed: int) -> list[Source]:
    """Deal each test part into halves, `validation` and `test`, for models that may have seen all else."""
    import torch

    from consilience.core.params import key

    small = [source.name for source in sources if len(source.test) < 2]
    if small:
        raise ConsilienceError(
            "every source needs at least 2 test examples, half to choose by and half to report on; "
            f"fewer in {', '.join(small)}."
        )

    halves = {}
    for source in sources:
        # Sources that share their test examples share their halves, too.
        if id(source.test) not in halves:
            order = torch.randperm(len(source.test), generator=key(seed, "choose", "halves"))
            rows = [half.sort().values for half in order.tensor_split(2)]
            halves[id(source.test)] = [source.test.select(half) for half in rows]
    return [
        replace(source, validation=halves[id(source.test)][0], test=halves[id(source.test)][1])
        for source in sources
    ]


def aggregators_of(text: str) -> dict[str, Aggregator]:
    """Build the aggregators of `ties(0.3),dare`, by these names."""
    return {name: aggregator_of(name) for name in listed(text)}
