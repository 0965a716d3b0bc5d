"""Corrections: how earlier knowledge changes training on a source; `methods` has the catalogue."""

from __future__ import annotations

from typing import TYPE_CHECKING

from consilience import lazy

# Classes load when they are first used, because they import torch.
if TYPE_CHECKING:
    from consilience.corrections.balancing import DWA as DWA
    from consilience.corrections.balancing import FAMO as FAMO
    from consilience.corrections.balancing import Balancing as Balancing
    from consilience.corrections.balancing import GradNorm as GradNorm
    from consilience.corrections.balancing import ScaleInvariant as ScaleInvariant
    from consilience.corrections.balancing import TaskWeights as TaskWeights
    from consilience.corrections.balancing import Uncertainty as Uncertainty
    from consilience.corrections.balancing import WorstTask as WorstTask
    from consilience.corrections.baselines import Cumulative as Cumulative
    from consilience.corrections.baselines import FromScratch as FromScratch
    from consilience.corrections.client_drift import GHBM as GHBM
    from consilience.corrections.client_drift import FedCM as FedCM
    from consilience.corrections.client_drift import FedDyn as FedDyn
    from consilience.corrections.client_drift import FedHBM as FedHBM
    from consilience.corrections.client_drift import LocalGHBM as LocalGHBM
    from consilience.corrections.client_drift import LocalSteps as LocalSteps
    from consilience.corrections.client_drift import Scaffold as Scaffold
    from consilience.corrections.conflicts import Conflicts as Conflicts
    from consilience.corrections.distillation import LessForgetting as LessForgetting
    from consilience.corrections.distillation import LwF as LwF
    from consilience.corrections.distillation import Stability as Stability
    from consilience.corrections.exemplars import GDumb as GDumb
    from consilience.corrections.exemplars import ICaRL as ICaRL
    from consilience.corrections.expansion import DEN as DEN
    from consilience.corrections.fedweit import FedWeIt as FedWeIt
    from consilience.corrections.generative import GenerativeReplay as GenerativeReplay
    from consilience.corrections.gss import GSS as GSS
    from consilience.corrections.inputs import Information as Information
    from consilience.corrections.inputs import InputMoments as InputMoments
    from consilience.corrections.isolation import HAT as HAT
    from consilience.corrections.isolation import Columns as Columns
    from consilience.corrections.isolation import PackNet as PackNet
    from consilience.corrections.moments import Moments as Moments
    from consilience.corrections.outputs import WSM as WSM
    from consilience.corrections.projection import AverageConstraint as AverageConstraint
    from consilience.corrections.projection import EpisodicConstraints as EpisodicConstraints
    from consilience.corrections.quadratic import EWC as EWC
    from consilience.corrections.quadratic import L2SP as L2SP
    from consilience.corrections.quadratic import MAS as MAS
    from consilience.corrections.quadratic import SI as SI
    from consilience.corrections.quadratic import OnlineEWC as OnlineEWC
    from consilience.corrections.quadratic import Proximal as Proximal
    from consilience.corrections.quadratic import Quadratic as Quadratic
    from consilience.corrections.quadratic import Running as Running
    from consilience.corrections.rehearsal import DER as DER
    from consilience.corrections.rehearsal import ER as ER
    from consilience.corrections.rehearsal import ERACE as ERACE
    from consilience.corrections.rehearsal import Buffer as Buffer
    from consilience.corrections.reuse import HeadReuse as HeadReuse
    from consilience.corrections.sensitivity import TaLoS as TaLoS
    from consilience.corrections.soft_sharing import SoftSharing as SoftSharing
    from consilience.corrections.solved import SolvedHead as SolvedHead
    from consilience.corrections.solved import StreamHead as StreamHead
    from consilience.corrections.superposition import PSP as PSP
    from consilience.corrections.superposition import SupSup as SupSup
    from consilience.corrections.superposition import XdG as XdG
    from consilience.corrections.supervision import DeepSupervision as DeepSupervision
else:
    __getattr__, __dir__ = lazy.attach(__name__)
