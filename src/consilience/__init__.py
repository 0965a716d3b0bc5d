"""Consilience: learning from heterogeneous sources, with one loop for tasks, time, places and trained models.

`run` and `sweep` run methods in settings, `search` finds hyperparameters, `merge` merges checkpoints, and
`distil` makes one model of several.
Catalogues are `methods`, `settings`, `data`, `models`, `losses`, `metrics`, `aggregators`, `consolidators`,
`mappers`, `memory`, `engines` and `trackers`; `experts` reads and writes trained models as files. For a
method of one's own: `Correction`, `Aggregator`, `Consolidator`, `Mapper`, `Policy`, `Maker`, and what their
verbs see and return; `testing.check` checks it.

>>> import consilience as cs
>>> cs.__version__
'0.2.0'
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from consilience import lazy
from consilience.version import __version__ as __version__

# Everything loads when it is first used: importing the package imports no torch.
if TYPE_CHECKING:
    from consilience import aggregators as aggregators
    from consilience import consolidators as consolidators
    from consilience import corrections as corrections
    from consilience import data as data
    from consilience import engines as engines
    from consilience import experts as experts
    from consilience import losses as losses
    from consilience import mappers as mappers
    from consilience import memory as memory
    from consilience import merging as merging
    from consilience import methods as methods
    from consilience import metrics as metrics
    from consilience import models as models
    from consilience import report as report
    from consilience import settings as settings
    from consilience import skill as skill
    from consilience import testing as testing
    from consilience import trackers as trackers
    from consilience.api import Result as Result
    from consilience.api import run as run
    from consilience.api import sweep as sweep
    from consilience.core.aggregator import Aggregator as Aggregator
    from consilience.core.aggregator import Blockwise as Blockwise
    from consilience.core.aggregator import Cone as Cone
    from consilience.core.aggregator import Linear as Linear
    from consilience.core.batch import Batch as Batch
    from consilience.core.buffer import Policy as Policy
    from consilience.core.consolidator import Consolidator as Consolidator
    from consilience.core.contexts import Beginning as Beginning
    from consilience.core.contexts import Begun as Begun
    from consilience.core.contexts import Context as Context
    from consilience.core.contexts import Learned as Learned
    from consilience.core.contexts import Memory as Memory
    from consilience.core.contexts import Routing as Routing
    from consilience.core.contexts import Row as Row
    from consilience.core.contexts import StepView as StepView
    from consilience.core.correction import Correction as Correction
    from consilience.core.correction import Mapper as Mapper
    from consilience.core.errors import ConsilienceError as ConsilienceError
    from consilience.core.errors import Interrupted as Interrupted
    from consilience.core.errors import Refusal as Refusal
    from consilience.core.losses import Loss as Loss
    from consilience.core.message import Message as Message
    from consilience.core.message import Module as Module
    from consilience.core.message import Private as Private
    from consilience.core.message import Samples as Samples
    from consilience.core.message import Statistics as Statistics
    from consilience.core.message import Weights as Weights
    from consilience.core.method import Method as Method
    from consilience.core.metrics import Metric as Metric
    from consilience.core.model import Model as Model
    from consilience.core.optimiser import Optimiser as Optimiser
    from consilience.core.sampler import Sampler as Sampler
    from consilience.core.schedule import Evaluate as Evaluate
    from consilience.core.schedule import Exchange as Exchange
    from consilience.core.schedule import Expert as Expert
    from consilience.core.schedule import Schedule as Schedule
    from consilience.core.schedule import ScheduleFacts as ScheduleFacts
    from consilience.core.schedule import Train as Train
    from consilience.core.source import LabelFrame as LabelFrame
    from consilience.core.source import Source as Source
    from consilience.core.source import Target as Target
    from consilience.core.stopping import Stopping as Stopping
    from consilience.core.synthetic import Maker as Maker
    from consilience.core.synthetic import Wanted as Wanted
    from consilience.core.teacher import Teacher as Teacher
    from consilience.core.training import Training as Training
    from consilience.core.tree import Tree as Tree
    from consilience.diagnosis import diagnose as diagnose
    from consilience.experts import distil as distil
    from consilience.merging import merge as merge
    from consilience.tuning import search as search
else:
    __getattr__, __dir__ = lazy.attach(__name__)
    __all__ = __dir__()
