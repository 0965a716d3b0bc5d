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
    clip: float = 0.0,
) -> Method:
    """SKILL: heads (and biases) on a frozen backbone, shared in a bank and routed to by one anchor per task.

    Models: `models.multi_head(models.backbone(..), ..)`, or `models.beneficial_biases`. For other mappers
    and more of their options, use `Method(.., mapper=mappers.gaussian_mixture(..))`.

    Paper: Ge et al. 2023.

    Args:
        mapper: how the task of an input is found: by a mixture of Gaussians, class means with one covariance,
            class means, the most certain head, autoencoders of features; "oracle" knows it.
        components: of "gaussian_mixture": Gaussians per task; one per 20 examples where there are fewer.
        prior: of "gaussian_mixture": weight of a task's components: by its number of examples, or equal.
        images: of "mahalanobis": images per class that are shared for the covariance (the paper: 5); 0 shares
            sums instead.
        rank: of "mahalanobis": rank of the shared factors of a task's scatter; 0 shares the whole matrix.
        reject: fraction of a task's validation examples to reject (sets the threshold). Inputs that score
            below their task's threshold are called unknown. 0 rejects nothing.
        head: "trained" by steps; "lp_ft": logistic regression on the features, then trained with the rest
            (linear probing, then fine-tuning); "logistic", "ridge", "prototype": solved for and not trained.
        reuse: start a new head from the rows of similar earlier classes, by their "name" or by "features".
        clip: largest distance of an example's features from their task's median, in median distances, for
            anchors and solved heads, so that outliers change little; 0: no limit.
    """
    from consilience import mappers
    from consilience.consolidators.bank import Experts
    from consilience.core.errors import ConsilienceError, unknown
    from consilience.core.method import Method
    from consilience.corrections.reuse import HeadReuse
    from consilience.corrections.solved import SolvedHead

    # Functions, so that only the chosen mapper checks its hyperparameters.
    made: dict[str, Callable[[], Mapper]] = {
        "gaussian_mixture": lambda: mappers.gaussian_mixture(components, prior, reject=reject, clip=clip),
        "mahalanobis": lambda: mappers.mahalanobis(images=images, rank=rank, reject=reject, clip=clip),
        "nearest_mean": lambda: mappers.nearest_mean(reject=reject, clip=clip),
        "min_entropy": mappers.min_entropy,
        "expert_gate": lambda: mappers.expert_gate(on="features", reject=reject, clip=clip),
        "oracle": mappers.oracle,
    }
    if mapper not in made:
        raise unknown("mapper", mapper, made)
    for name, value in (("images", images), ("rank", rank)):
        if mapper != "mahalanobis" and value != 0:
            raise ConsilienceError(
                f"`{name}` is an option of the mapper mahalanobis; with {mapper!r} it must be 0, "
                f"got `{name} = {value!r}`."
            )
    if reject and mapper in ("min_entropy", "oracle"):
        raise ConsilienceError(
            f"`reject` needs a mapper with anchors; with {mapper!r} it must be 0, got `reject = {reject!r}`."
        )
    if clip and mapper in ("min_entropy", "oracle") and head == "trained":
        raise ConsilienceError(
            "`clip` limits the features of anchors and of solved heads, and here are neither; it must be 0, "
            f"got `clip = {clip!r}`."
        )
    heads = ("trained", "lp_ft", "logistic", "ridge", "prototype")
    if head not in heads:
        raise unknown("head", head, heads)
    if reuse not in (None, "name", "features"):
        raise unknown("reuse", str(reuse), ("name", "features"))
    if head != "trained" and reuse:
        raise ConsilienceError(
            "`reuse` must be None where the head is solved for, "
            f"got `head = {head!r}` and `reuse = {reuse!r}`."
        )
    # A head that is solved for needs no step; with "lp_ft" the solution is where training starts.
    solved = SolvedHead("logistic" if head == "lp_ft" else head, clip=clip) if head != "trained" else None
    parts = (HeadReuse(reuse),) if reuse else (solved,) if solved else ()
    fixed = {} if head in ("trained", "lp_ft") else {"epochs": 0}
    return Method("skill", parts, consolidator=Experts(), mapper=made[mapper](), fixed=fixed)
