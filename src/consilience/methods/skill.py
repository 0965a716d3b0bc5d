"""Methods known from shared-knowledge lifelong learning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

    from consilience.core.correction import Mapper
    from consilience.core.method import Method


def skill(
    mapper: Literal[
        "gaussian_mixture", "mahalanobis", "nearest_mean", "min_entropy", "expert_gate", "oracle"
    ] = "gaussian_mixture",
    components: int = 25,
    prior: Literal["size", "uniform"] = "uniform",
    images: int = 0,
    rank: int = 0,
    reject: float = 0.0,
    head: Literal["trained", "lp_ft", "logistic", "ridge", "prototype"] = "trained",
    reuse: Literal["name", "features"] | None = None,
) -> Method:
    """Heads (and biases) on a frozen backbone are learned apart, shared in a bank, and an anchor of each task routes inputs to them.

    Models: `models.multi_head(models.backbone(..), ..)`, or `models.beneficial_biases`; other mappers and more of their options by
    `Method(.., mapper=mappers.gaussian_mixture(..))`.

    Paper: Ge et al. 2023.

    Args:
        mapper: how the task of an input is found: by a mixture of Gaussians, class means with one covariance, class means, the surest
            head, autoencoders of features; "oracle" is told it.
        components: of "gaussian_mixture": Gaussians a task; one for 20 examples where there are fewer.
        prior: of "gaussian_mixture": whether a task's components weigh by its examples.
        images: of "mahalanobis": images of each class that are shared for the covariance (the paper: 5); 0 shares sums instead.
        rank: of "mahalanobis": factors of a task's scatter that are shared instead of the whole; 0 is the whole.
        reject: the share of a task's own validation examples that fall below its mark; an input below that of the task it goes to is unknown. 0: every input belongs to a task.
        head: trained by steps; "lp_ft": solved for by logistic regression on the backbone's features, and then trained with the rest (linear
            probing, then fine-tuning); or solved for and not trained ("logistic", "ridge", "prototype").
        reuse: a new head begins with the rows of similar classes learned before, by their "name" or by "features".
    """
    from consilience import mappers
    from consilience.consolidators.bank import Experts
    from consilience.core.errors import ConsilienceError, unknown
    from consilience.core.method import Method
    from consilience.corrections.reuse import HeadReuse
    from consilience.corrections.solved import SolvedHead

    made: dict[str, Callable[[], Mapper]] = {
        "gaussian_mixture": lambda: mappers.gaussian_mixture(components, prior, reject=reject),
        "mahalanobis": lambda: mappers.mahalanobis(images=images, rank=rank, reject=reject),
        "nearest_mean": lambda: mappers.nearest_mean(reject=reject),
        "min_entropy": mappers.min_entropy,
        "expert_gate": lambda: mappers.expert_gate(on="features", reject=reject),
        "oracle": mappers.oracle,
    }
    if mapper not in made:
        raise unknown("mapper", mapper, made)
    for name, value in (("images", images), ("rank", rank)):
        if mapper != "mahalanobis" and value != 0:
            raise ConsilienceError(
                f"`{name}` should be 0 for another mapper than mahalanobis. Found `{name} = {value!r}`."
            )
    if reject and mapper in ("min_entropy", "oracle"):
        raise ConsilienceError(
            f"`reject` should be 0 for a mapper without anchors. Found `reject = {reject!r}` for {mapper!r}."
        )
    heads = ("trained", "lp_ft", "logistic", "ridge", "prototype")
    if head not in heads:
        raise unknown("head", head, heads)
    if reuse not in (None, "name", "features"):
        raise unknown("reuse", str(reuse), ("name", "features"))
    if head != "trained" and reuse:
        raise ConsilienceError(
            f"`reuse` should be None where a head is solved for. Found `head = {head!r}` and `reuse = {reuse!r}`."
        )
    solved = SolvedHead("logistic" if head == "lp_ft" else head) if head != "trained" else None
    parts = (HeadReuse(reuse),) if reuse else (solved,) if solved else ()
    fixed = {} if head in ("trained", "lp_ft") else {"epochs": 0}
    return Method("skill", parts, consolidator=Experts(), mapper=made[mapper](), fixed=fixed)
