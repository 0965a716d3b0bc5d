"""Mappers: which expert answers for an input. Signatures import no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from consilience.mappers.confidence import Average, MinEntropy, Oracle
    from consilience.mappers.mixture import GaussianMixture, NearestMean


def oracle() -> Oracle:
    """The true task is told at evaluation: an upper bound."""
    from consilience.mappers.confidence import Oracle

    return Oracle()


def average() -> Average:
    """Every expert has the same weight."""
    from consilience.mappers.confidence import Average

    return Average()


def min_entropy() -> MinEntropy:
    """The expert that is most certain of its answer."""
    from consilience.mappers.confidence import MinEntropy

    return MinEntropy()


def nearest_mean() -> NearestMean:
    """The expert whose nearest class mean, in feature space, is nearest."""
    from consilience.mappers.mixture import NearestMean

    return NearestMean()


def gaussian_mixture(components: int = 25, prior: str = "uniform") -> GaussianMixture:
    """The expert of the likeliest component among the mixtures of all sources.

    Args:
        components: diagonal Gaussians a source.
        prior: "uniform" (mixtures are pooled), or "size" (they weigh by their source's examples).
    """
    from consilience.mappers.mixture import GaussianMixture

    return GaussianMixture(components, prior)  # type: ignore[arg-type]
