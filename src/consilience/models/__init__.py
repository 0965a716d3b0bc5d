"""The catalogue of models: inputs [B, ...] -> outputs [B, C] as pure functions of parameters and buffers.

Nothing here imports torch before it is called, so that the command line answers at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from consilience import lazy
from consilience.core.errors import ConsilienceError, suggest_arguments

# These modules import torch when they are loaded.
if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor, nn

    from consilience.core.model import Model
    from consilience.core.params import Params
    from consilience.core.source import Source
    from consilience.models.adapted import Adapted as Adapted
    from consilience.models.answers import Joint as Joint
    from consilience.models.biased import Biased as Biased
    from consilience.models.columns import Progressive as Progressive
    from consilience.models.composed import Composed
    from consilience.models.experts import Given
    from consilience.models.experts import Mixture as Mixture
    from consilience.models.heads import MultiHead as MultiHead
    from consilience.models.module import ModuleModel as ModuleModel
    from consilience.models.networks import Networks as Networks
    from consilience.models.networks import Stitched as Stitched
    from consilience.models.steered import Attended as Attended
    from consilience.models.steered import Conditioned as Conditioned
    from consilience.models.tangent import Tangent as Tangent
    from consilience.models.toes import Toes as Toes

    M = TypeVar("M", ModuleModel, MultiHead, Composed)
else:
    __getattr__, __dir__ = lazy.attach(__name__)

__all__ = [
    "adapters",
    "backbone",
    "beneficial_biases",
    "cgc",
    "char_lstm",
    "char_transformer",
    "conditioned",
    "conv",
    "cross_stitch",
    "fourier_features",
    "frozen",
    "head2toe",
    "joint",
    "lenet",
    "linear",
    "linearised",
    "macs",
    "mlp",
    "mmoe",
    "mtan",
    "mti_net",
    "multi_head",
    "multi_net",
    "nddr",
    "pad_net",
    "ple",
    "progressive",
    "progressive_conv",
    "random_features",
    "recommender",
    "resnet",
    "sharing",
    "sluice",
    "wrap",
]


def linear(inputs: int, outputs: int = 10) -> ModuleModel:
    """Return W x + b of the flattened inputs [B, inputs].

    >>> import torch
    >>> sorted(linear(4, 3).init(torch.Generator())[0])
    ['1.bias', '1.weight']
    """
    from consilience.core.checks import whole_number
    from consilience.models import nets
    from consilience.models.module import ModuleModel

    whole_number(inputs=inputs, outputs=outputs)
    name = f"linear({inputs}, {outputs})"
    return ModuleModel(lambda: nets.mlp(inputs, (), outputs), outputs, name=name)


def mlp(inputs: int, hidden: Sequence[int] = (128,), outputs: int = 10) -> ModuleModel:
    """Return a perceptron on the flattened inputs [B, inputs], with ReLU between its layers.

    >>> import torch
    >>> model = mlp(64, (32,), 10)
    >>> params, buffers = model.init(torch.Generator().manual_seed(0))
    >>> model(params, buffers, torch.zeros(2, 8, 8), None, False)[0].shape
    torch.Size([2, 10])
    """
    from consilience.core.checks import whole_number
    from consilience.models import nets
    from consilience.models.module import ModuleModel

    whole_number(inputs=inputs, outputs=outputs)
    for width in hidden:
        whole_number(hidden=width)
    # A copy: the list is read again whenever parameters are made.
    widths = tuple(hidden)
    name = f"mlp({inputs}, {widths}, {outputs})"
    return ModuleModel(lambda: nets.mlp(inputs, widths, outputs), outputs, name=name)


def lenet(outputs: int = 10, channels: int = 1, size: int = 28) -> ModuleModel:
    """Return LeNet-5 with ReLU and max pooling, on images [B, channels, size, size]. LeCun et al. 1998.

    >>> lenet().head({}, None)
    ('11.weight', '11.bias')
    """
    from consilience.core.checks import whole_number
    from consilience.models import nets
    from consilience.models.module import ModuleModel

    whole_number(outputs=outputs, channels=channels)
    # Smaller images leave nothing after the second convolution and its pooling.
    whole_number(12, size=size)
    name = f"lenet({outputs}, {channels}, {size})"
    return ModuleModel(lambda: nets.lenet(outputs, channels, size), outputs, name=name)


def conv(outputs: int = 10, channels: int = 1, size: int = 28, width: int = 32) -> ModuleModel:
    """Return two 3 x 3 convolutions with ReLU and pooling, and a linear head; [B, channels, size, size].

    They have `width` and 2 `width` maps.

    >>> conv(size=8, width=4).width
    32
    """
    from consilience.core.checks import whole_number
    from consilience.models import nets
    from consilience.models.module import ModuleModel

    whole_number(outputs=outputs, channels=channels, width=width)
    # Two poolings halve the side twice.
    whole_number(4, size=size)
    name = f"conv({outputs}, {channels}, {size}, {width})"
    return ModuleModel(lambda: nets.conv(outputs, channels, size, width), outputs, name=name)


def fitting(inputs: tuple[int, ...], outputs: int) -> ModuleModel:
    """Return the usual net for inputs [B, *inputs]: `conv` for square images of side >= 8, else `mlp`.

    >>> fitting((1, 28, 28), 10), fitting((4,), 3)
    (conv(10, 1, 28, 32), mlp(4, (128,), 3))
    """
    # Two poolings leave something of images of that side.
    if len(inputs) == 3 and inputs[1] == inputs[2] and inputs[1] >= 8:
        return conv(outputs, channels=inputs[0], size=inputs[1])
    return mlp(prod(inputs), (128,), outputs)


def resnet(
    depth: Literal[18, 20] = 20,
    outputs: int = 10,
    channels: int = 3,
    norm: Literal["group", "batch"] = "group",
    width: int = 16,
) -> ModuleModel:
    """Return a residual network for small images [B, channels, H, W]: CIFAR's ResNet-20, or a ResNet-18.

    The stem of this ResNet-18 keeps the size of the images. The usual one has `width=64`. Shortcuts that
    change shape are 1 x 1 convolutions. He et al. 2016. With group norm (at most 8 groups) samples do not
    depend on their batch, which averages of models and vmap need; Wu and He 2018.

    >>> resnet().has_batch_norm, resnet(norm="batch").has_batch_norm
    (False, True)
    """
    from consilience.core.checks import whole_number
    from consilience.models import nets
    from consilience.models.module import ModuleModel

    whole_number(outputs=outputs, channels=channels, width=width)
    # Types are not checked at run time, and a configuration may have any value.
    if depth not in (18, 20):
        raise ConsilienceError(f"`depth` must be 18 or 20, got {depth}.")
    if norm not in ("group", "batch"):
        raise ConsilienceError(f"`norm` must be 'group' or 'batch', got {norm!r}.")
    name = f"resnet({depth}, {outputs}, {channels}, {norm!r}, {width})"
    return ModuleModel(lambda: nets.ResNet(depth, outputs, channels, norm, width), outputs, name=name)


def char_lstm(outputs: int = 64, embedding: int = 8, hidden: int = 128, layers: int = 1) -> ModuleModel:
    """Predict the next of `outputs` characters from x [B, T] (whole numbers): embedding, LSTM, linear head.

    The head reads the last state. McMahan et al. 2017 have 2 layers of 256 units. The equations are those of
    nn.LSTM, in plain operations, so that many clients run at once.

    Args:
        outputs: the number of different characters.
        embedding: the width of a character's vector.
        hidden: the number of units per layer.
        layers: the number of LSTM layers.

    >>> import torch
    >>> model = char_lstm(10, 4, 6)
    >>> model(*model.init(torch.Generator()), torch.zeros(2, 5, dtype=torch.long), None, False)[0].shape
    torch.Size([2, 10])
    """
    from consilience.core.checks import whole_number
    from consilience.models import nets
    from consilience.models.module import ModuleModel

    whole_number(outputs=outputs, embedding=embedding, hidden=hidden, layers=layers)
    name = f"char_lstm({outputs}, {embedding}, {hidden}, {layers})"
    return ModuleModel(lambda: nets.CharLSTM(outputs, embedding, hidden, layers), outputs, name=name)


def char_transformer(
    outputs: int = 64, window: int = 80, width: int = 64, heads: int = 4, layers: int = 2
) -> ModuleModel:
    """Predict the next of `outputs` characters from x [B, T <= window] (whole numbers): a causal transformer.

    It is pre-norm, with learned embeddings of positions.

    Args:
        outputs: the number of different characters.
        window: the largest number of characters in a sample.
        width: the width of a position's state; a multiple of `heads`.
        heads: the number of heads of attention.
        layers: the number of blocks, each of attention and a perceptron of 4 x `width` units.

    >>> import torch
    >>> model = char_transformer(10, 5, 8, 2, 1)
    >>> model(*model.init(torch.Generator()), torch.zeros(2, 5, dtype=torch.long), None, False)[0].shape
    torch.Size([2, 10])
    """
    from consilience.core.checks import whole_number
    from consilience.models import nets
    from consilience.models.module import ModuleModel

    whole_number(outputs=outputs, window=window, width=width, heads=heads, layers=layers)
    if width % heads:
        raise ConsilienceError(f"`width` must be a multiple of `heads`, got width={width} and heads={heads}.")
    name = f"char_transformer({outputs}, {window}, {width}, {heads}, {layers})"
    return ModuleModel(
        lambda: nets.CharTransformer(outputs, window, width, heads, layers), outputs, name=name
    )


def random_features(inputs: int, width: int = 512, seed: int = 0) -> ModuleModel:
    """Return frozen random ReLU features max(W x + b, 0) [B, width] of flattened x in [0, 1]; no head.

    W ~ N(0, 12 / inputs), so that W x has unit variance over the unit cube. b = -W c, so that the kink of
    each feature passes through a point c of the cube, uniform on the segment from 0 to a uniform point. The
    features depend on `seed` alone: every run and every agent has the same backbone. Rahimi and Recht 2008.

    >>> import torch
    >>> model = random_features(4, 8)
    >>> first, second = (model.init(torch.Generator().manual_seed(seed))[0] for seed in (0, 1))
    >>> model.backbone(first) == model.backbone(second)
    True
    """
    from consilience.core.checks import whole_number
    from consilience.models import nets
    from consilience.models.module import ModuleModel

    whole_number(inputs=inputs, width=width)
    name = f"random_features({inputs}, {width}, {seed})"
    # A module, not a function that makes one: its weights must not depend on the seed of the run.
    module = nets.random_features(inputs, width, seed)
    return ModuleModel(module, width, frozen=("*",), headless=True, name=name)


def fourier_features(model: ModuleModel, width: int = 2048, sigma: float = 1.0, seed: int = 0) -> ModuleModel:
    """Put random Fourier features sqrt(2 / D) cos(Omega psi + b) [B, D] before a new head of the model.

    psi [B, d] are the model's features. Omega ~ N(0, 1 / sigma^2) and b uniform in [0, 2 pi) are frozen and
    drawn from `seed` alone, so that all agents have the same. Inner products are the Gaussian kernel
    exp(-|psi - psi'|^2 / (2 sigma^2)), up to 1 / sqrt(D). With `methods.fed3r` it is Fed3R with random
    features of the model's first parameters; in other methods, `frozen` keeps these. Rahimi and Recht 2007.

    Args:
        model: a model of one module; its head is taken off.
        width: D, the number of features.
        sigma: the width of the kernel; about the median distance of features.
        seed: the seed of Omega and b.

    Raises:
        ConsilienceError: `width` < 1, or `sigma` not positive.

    >>> import torch
    >>> model = fourier_features(mlp(4, (8,), 3), 16)
    >>> model.width, [n for n in model.init(torch.Generator())[0] if model.frozen(n)], model.outputs
    (16, ['fourier.weight', 'fourier.bias'], 3)
    """
    from consilience.core.checks import positive, whole_number
    from consilience.models import nets
    from consilience.models.module import ModuleModel, same_tensors

    whole_number(width=width)
    positive(sigma=sigma)
    if not isinstance(model, ModuleModel):
        raise ConsilienceError(
            f"`model` must be a model of one module, as models.wrap makes it, got {type(model).__name__}."
        )
    body, outputs = model.body(), model.outputs
    frozen = [f"body.{entry}" for entry in body.entries if body.frozen(entry)]

    def make() -> nn.Module:
        # A new body per call, because models must not share a module; its entries never change in place.
        trunk = body.factory() if body.factory else same_tensors(body.module)
        return nets.Fourier(trunk, body.width, width, sigma, seed, outputs)

    name = f"fourier_features({model.description}, {width}, {sigma}, {seed})"
    return ModuleModel(make, outputs, head="head", frozen=("fourier.*", *frozen), name=name)


def backbone(
    of: str | nn.Module | Model,
    checkpoint: str | Path | None = None,
    size: int | tuple[int, int] | Literal["own"] | None = "own",
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    **more: Any,
) -> ModuleModel:
    """Return frozen features psi(x) [B, d] of images x [B, 1 or c, H, W] in [0, 1]; no head.

    The body is a `timm` model or any torch module. Images are resized to `size` (bilinear, antialiased where
    they shrink), grey ones repeated to c channels, then (x - mean) / std. Features [B, d] are returned as
    they are, so that agents with images and agents with features that `data.embed` kept have one model. It
    always runs in eval mode. Its hash (`Model.backbone`) covers weights, buffers, `size`, mean, std and what
    the module is: for timm's models their name, for others what torch prints of them, and their parts'
    classes and plain public attributes.

    Args:
        of: a name of timm's (`consilience[vision]`), a torch module (its last linear layer is taken off;
            without any, its outputs are the features), or a model of one (`wrap(.., headless=True)` keeps
            its last layer; `outputs` need not be given).
        checkpoint: weights as a safetensors file, read as float32; None: timm's from the hub, or the
            module's.
        size: height and width (one number: both); "own": timm's for this model, else the size of the images;
            None: the size of the images.
        mean, std: per channel, or one number for all; None: timm's for this model, else 0 and 1.
        more: options for `timm.create_model`; `pretrained=False` gives random weights, always the same.

    Raises:
        ConsilienceError: timm is not installed, or has no such model; entries that the checkpoint lacks or
            has too many of (except the classifier's); a std that is not positive; a body that does not take
            images of `size`.

    >>> import torch
    >>> model = backbone(conv(3, 3, 8, 4), size=8, mean=0.5, std=0.5)
    >>> params, buffers = model.init(torch.Generator())
    >>> psi = model(params, buffers, torch.rand(2, 1, 12, 12), None, True)[0]
    >>> model.width, torch.equal(model(params, buffers, psi, None, False)[0], psi)
    (32, True)
    """
    from consilience.models import pretrained

    prepare = pretrained.Preparation(size, mean, std)
    if isinstance(of, str):
        return pretrained.of_timm(of, checkpoint, prepare, more)
    if more:
        # Nothing would read them, and a misspelt option would be lost.
        listed = ", ".join(sorted(more))
        raise ConsilienceError(f"only a timm model by name takes more options, got {listed}.")
    return pretrained.of_module(of, checkpoint, prepare)


def macs(
    model: Model | nn.Module, sample: Tensor | Mapping[str, Any] | Sequence[int], task: str | None = None
) -> int:
    """Count the multiply-accumulates of one forward pass of one sample.

    They are half the FLOPs of matrix products and convolutions, as torch counts them, without additions,
    activations and norms. Training costs about three times as much, or less where layers are frozen.

    Args:
        model: a model with its first parameters, or a torch module.
        sample: samples [B, ..], in parts or as one tensor, or the shape (..) of one.
        task: the task that the model is given.

    >>> macs(mlp(4, (8,), 3), (4,))
    56
    """
    from consilience.models.module import count_macs

    return count_macs(model, sample, task)


@overload
def multi_head(
    trunk: ModuleModel,
    outputs: int,
    norm: Literal["inf"] | None = None,
    hidden: Sequence[int] = (),
    shared: None = None,
) -> MultiHead: ...
@overload
def multi_head(
    trunk: Given,
    outputs: int,
    norm: Literal["inf"] | None = None,
    hidden: Sequence[int] = (),
    *,
    shared: int,
) -> Networks: ...
def multi_head(
    trunk: Given,
    outputs: int,
    norm: Literal["inf"] | None = None,
    hidden: Sequence[int] = (),
    shared: int | None = None,
) -> MultiHead | Networks:
    """Return one head per task, on the features of a trunk without its own head; C = `outputs`.

    That is hard parameter sharing (Caruana 1997). With `shared` = k only the first k layers of the trunk are
    common, and the others exist once per task: 0 are independent networks, and all layers are hard sharing.

    Args:
        trunk: a model of one module; its head is taken off. With `shared` also a torch module, or a function
            that makes one, whose outputs are the features.
        outputs: the number of output columns; each head has those of its task's classes.
        norm: "inf": logits psi (W / ||W||_inf)^T + b, each row divided by its own largest magnitude, also in
            training, so that rows of several heads are comparable.
        hidden: the widths of ReLU layers that each task has before its linear head.
        shared: how many layers are common; None: the trunk as a whole. A layer is a child of an
            nn.Sequential that has entries, with what follows it; another trunk is one layer.

    >>> import torch
    >>> model = multi_head(random_features(4, 8), outputs=10)
    >>> model(*model.init(torch.Generator()), torch.zeros(2, 4), None, False)[0].sum().item()
    0.0
    >>> list(multi_head(mlp(4, (8, 8)), 10, shared=1).init(torch.Generator())[0])
    ['trunk.1.weight', 'trunk.1.bias']
    """
    from consilience.models.heads import MultiHead
    from consilience.models.networks import Networks

    if shared is not None:
        return Networks(trunk, outputs, shared, hidden, norm)
    # Anything but a model is refused there.
    return MultiHead(trunk, outputs, norm, hidden)  # type: ignore[arg-type]


def cross_stitch(
    trunk: Given,
    outputs: int,
    own: float = 0.9,
    other: float = 0.1,
    shared: int = 0,
    hidden: Sequence[int] = (),
) -> Stitched:
    """Return one network per task, and units that mix what the networks give after each layer.

    Misra et al. 2016. The numbers learned are `result.params["stitch.TASK.LAYER.OTHER"]`. With own=1 and
    other=0, frozen, they are independent networks.

    Args:
        trunk: a torch module, a function that makes one, or a model of one (its head is taken off); its
            layers are the children of an nn.Sequential that have entries, or else it is one layer.
        outputs: the number of output columns; each head has those of its task's classes.
        own: the first weight of a task's own network.
        other: the first weight of the mean of the other networks.
        shared: how many of the first layers are common to all tasks, and have no unit.
        hidden: the widths of ReLU layers that each task has before its linear head.

    >>> cross_stitch(mlp(4, (8, 8)), 10)
    cross_stitch(mlp(4, (8, 8), 10), 10, own=0.9, other=0.1, shared=0, hidden=())
    """
    from consilience.models.networks import Stitched

    return Stitched(trunk, outputs, "stitch", own, other, shared, hidden)


def nddr(
    trunk: Given,
    outputs: int,
    own: float = 0.9,
    other: float = 0.1,
    shared: int = 0,
    hidden: Sequence[int] = (),
) -> Stitched:
    """Return one network per task; after each layer a task reads all channels of all networks.

    Neural discriminative dimensionality reduction: a matrix over channels (1 x 1 convolution) where
    `cross_stitch` has a number. Gao et al. 2019; without their norms.

    Args:
        trunk: as in `cross_stitch`.
        outputs: the number of output columns; each head has those of its task's classes.
        own: the matrix of a task's own channels begins as this multiple of the identity.
        other: those of the other networks begin as this multiple.
        shared: how many of the first layers are common to all tasks.
        hidden: the widths of ReLU layers that each task has before its linear head.

    >>> nddr(mlp(4, (8, 8)), 10).unit
    'nddr'
    """
    from consilience.models.networks import Stitched

    return Stitched(trunk, outputs, "nddr", own, other, shared, hidden)


def sluice(
    trunk: Given,
    outputs: int,
    subspaces: int = 2,
    own: float = 0.9,
    other: float = 0.1,
    shared: int = 0,
    hidden: Sequence[int] = (),
) -> Stitched:
    """Return a sluice network: the architecture is learned, by alphas between subspaces and betas of layers.

    One network per task; alphas mix the subspaces of all networks after each layer, and betas say how much
    each layer counts in the features of the head. Ruder et al. 2019.

    Args:
        trunk: as in `cross_stitch`; its layers must have one width.
        outputs: the number of output columns; each head has those of its task's classes.
        subspaces: in how many equal parts the channels of a layer are cut.
        own: the first alpha of a subspace with itself, and the first beta of the last layer.
        other: the first alpha of other subspaces, and the sum of the first betas of the other layers.
        shared: how many of the first layers are common to all tasks.
        hidden: the widths of ReLU layers that each task has before its linear head.

    >>> sluice(mlp(4, (8, 8)), 10).subspaces
    2
    """
    from consilience.models.networks import Stitched

    return Stitched(trunk, outputs, "sluice", own, other, shared, hidden, subspaces)


def mmoe(
    expert: Given, outputs: int, experts: int = 4, stem: Given | None = None, hidden: Sequence[int] = ()
) -> Mixture:
    """Return experts that all tasks share, and per task a gate that weighs them and a head.

    Multi-gate mixture of experts: psi_t = sum_i softmax(W_t z + b_t)_i E_i(z). One expert is hard sharing. A
    run warns of experts that no task uses; `sharing` and the report have the gates. Ma et al. 2018.

    Args:
        expert: a torch module, a function that makes one, or a model of one (its head is taken off). A module
            with weights makes equal experts; give a function.
        outputs: the number of output columns; each head has those of its task's classes.
        experts: the number of experts.
        stem: what experts and gates read, z = stem(x), such as an embedding of tokens; None: the inputs,
            which gates read flattened.
        hidden: the widths of ReLU layers that each task has before its linear head.

    >>> from torch import nn
    >>> model = mmoe(lambda: nn.Sequential(nn.Linear(64, 32), nn.ReLU()), outputs=3, experts=8)
    >>> model.count, model.name
    (8, 'mmoe(Sequential)')
    """
    from consilience.models.experts import Mixture

    return Mixture([expert], outputs, experts, 0, stem, hidden)


def cgc(
    expert: Given,
    outputs: int,
    shared: int = 2,
    own: int = 1,
    stem: Given | None = None,
    hidden: Sequence[int] = (),
) -> Mixture:
    """Return shared experts, experts per task, and per task a gate over its own and the shared ones.

    Customised gate control: one extraction layer of `ple`. Tang et al. 2020.

    Args:
        expert: as in `mmoe`.
        outputs: the number of output columns; each head has those of its task's classes.
        shared: the number of shared experts.
        own: the number of experts of each task.
        stem: as in `mmoe`.
        hidden: the widths of ReLU layers that each task has before its linear head.

    >>> from torch import nn
    >>> cgc(lambda: nn.Linear(4, 3), outputs=3).own
    1
    """
    from consilience.models.experts import Mixture

    return Mixture([expert], outputs, shared, own, stem, hidden)


def ple(
    experts: Sequence[Given],
    outputs: int,
    shared: int = 2,
    own: int = 1,
    stem: Given | None = None,
    hidden: Sequence[int] = (),
) -> Mixture:
    """Return progressive layered extraction: layers of shared experts and experts of tasks, with gates.

    In each layer a task weighs its own experts and the shared ones; a shared gate weighs the experts of all
    tasks for the shared experts of the next layer. One layer is `cgc`. Tang et al. 2020.

    Args:
        experts: what makes an expert of each layer, as in `mmoe`; those of the second layer read what those
            of the first give.
        outputs: the number of output columns; each head has those of its task's classes.
        shared: the number of shared experts of a layer.
        own: the number of experts of each task in a layer.
        stem: as in `mmoe`.
        hidden: the widths of ReLU layers that each task has before its linear head.

    >>> from torch import nn
    >>> model = ple([lambda: nn.Linear(4, 8), lambda: nn.Linear(8, 8)], outputs=3)
    >>> model.name
    'ple(Linear)'
    """
    from consilience.models.experts import Mixture

    return Mixture(experts, outputs, shared, own, stem, hidden)


def mtan(trunk: Given, outputs: int, hidden: Sequence[int] = ()) -> Attended:
    """Return one trunk, and per task attention that selects channels and places of each of its layers.

    Multi-task attention network, for vectors, sequences and images. Liu, Johns & Davison 2019.

    Args:
        trunk: as in `cross_stitch`; its layers must say their widths, as nn.Linear and nn.Conv2d do.
        outputs: the number of output columns; each head has those of its task's classes.
        hidden: the widths of ReLU layers that each task has before its linear head.

    >>> len(mtan(mlp(4, (8, 8)), 10).layers)
    2
    """
    from consilience.models.steered import Attended

    return Attended(trunk, outputs, hidden)


def conditioned(
    trunk: Given,
    outputs: int,
    form: Literal["sum", "concatenation", "multiplicative", "film", "gating"] = "film",
    size: int = 16,
    layers: Sequence[int] | None = None,
    hidden: Sequence[int] = (),
) -> Conditioned:
    """Return one trunk whose layers read a learned embedding of the task, and a head per task.

    Args:
        trunk: as in `mtan`.
        outputs: the number of output columns; each head has those of its task's classes.
        form: how a layer h reads an embedding e: "sum" h + A e; "concatenation" C [h; e]; "multiplicative"
            h * (1 + A e); "film" h * (1 + A e) + B e (Perez et al. 2018); "gating" h * sigmoid(A e + c).
        size: the width of an embedding.
        layers: the numbers of the layers that read it, from 0; None: all.
        hidden: the widths of ReLU layers that each task has before its linear head.

    >>> conditioned(mlp(4, (8, 8)), 10, "gating", layers=[1]).chosen
    (1,)
    """
    from consilience.models.steered import Conditioned

    return Conditioned(trunk, outputs, form, size, layers, hidden)


def beneficial_biases(
    backbone: ModuleModel | nn.Module, outputs: int, last: float = 1.0, norm: Literal["inf"] | None = None
) -> Biased:
    """Return a frozen backbone, and per task a linear head and a bias B per output channel of its layers.

    Convolutions give y = Conv(x) + b + B, and linear layers likewise; B begins at 0, so that the model
    begins as the backbone. With `methods.finetune` nothing is forgotten; with `methods.skill` biases and
    heads are sent. Ge et al., "Lightweight Learner for Shared Knowledge Lifelong Learning", 2023.

    Args:
        backbone: a model of one module, or a torch module; its head is taken off.
        outputs: the number of output columns; each head has those of its task's classes.
        last: the fraction of the layers, from the end, that have biases, rounded up; 0: none. Layers that a
            `models.backbone` never calls do not count.
        norm: of the heads, as in `multi_head`.

    >>> beneficial_biases(conv(3, size=8, width=4), 10, last=0.5).layers
    ('3',)
    """
    from consilience.core.model import Model
    from consilience.models.biased import Biased
    from consilience.models.module import ModuleModel

    # A torch module becomes a model that begins with its weights.
    return Biased(backbone if isinstance(backbone, Model) else ModuleModel(backbone), outputs, last, norm)


def progressive(
    inputs: int,
    hidden: Sequence[int] = (128,),
    outputs: int = 10,
    bottleneck: int | None = None,
    shrink: float = 1.0,
) -> Progressive:
    """Return one perceptron (a column) per task on flattened inputs [B, inputs], which reads earlier columns.

    Rusu et al. 2016.

    Args:
        inputs: the number of inputs of a sample.
        hidden: the units of the layers of the first column.
        outputs: the number of output columns; each head has those of its task's classes.
        bottleneck: units that a layer makes of all earlier columns; None: as many as the layer before has.
        shrink: column k = 0, 1, .. has shrink^k times the units of the first, rounded.

    >>> progressive(4, (8, 8)).widths
    (8, 8)
    """
    from consilience.core.checks import whole_number
    from consilience.models.columns import Progressive

    whole_number(inputs=inputs)
    return Progressive((inputs,), hidden, outputs, bottleneck, shrink)


def progressive_conv(
    outputs: int = 10,
    channels: int = 1,
    size: int = 28,
    width: int = 32,
    bottleneck: int | None = None,
    shrink: float = 1.0,
) -> Progressive:
    """Return one small convolutional network (a column) per task, which reads earlier columns.

    As in `conv`: two 3 x 3 convolutions (`width` and 2 `width` maps) with ReLU and pooling; [B, channels,
    size, size]. Rusu et al. 2016.

    Args:
        outputs: the number of output columns; each head has those of its task's classes.
        channels: the number of channels of the images.
        size: the side of the images.
        width: the maps of the first layer of the first column.
        bottleneck: maps that a layer makes of all earlier columns; None: as many as the layer before has.
        shrink: column k = 0, 1, .. has shrink^k times the maps of the first, rounded.

    >>> progressive_conv(size=8, width=4).widths
    (4, 8)
    """
    from consilience.core.checks import whole_number
    from consilience.models.columns import Progressive

    whole_number(channels=channels, width=width)
    # Two poolings halve the side twice.
    whole_number(4, size=size)
    return Progressive((channels, size, size), (width, 2 * width), outputs, bottleneck, shrink)


def adapters(
    backbone: ModuleModel | nn.Module, outputs: int, bottleneck: int = 16, layers: Sequence[str] | None = None
) -> Adapted:
    """Return a frozen backbone, and per task a linear head and residual bottlenecks h + U relu(V h) in it.

    With `methods.finetune` nothing is forgotten; with `methods.skill` adapters and heads are sent. A
    backbone that a function makes begins at random, from the seed; a torch module (or `wrap` of one) comes
    with its weights. Its own head is taken off. Houlsby et al. 2019, Rebuffi et al. 2017.

    Args:
        backbone: a model of one module, or a torch module.
        outputs: the number of output columns; each head has those of its task's classes.
        bottleneck: the rows of V.
        layers: shell patterns of names of layers or blocks that adapters follow (`*` also matches dots);
            None: every convolution, linear layer and attention (of a `models.backbone`: those it calls).

    >>> adapters(resnet(width=4), 10, layers=("body.?",)).layers[:2]
    ('body.0', 'body.1')
    """
    from consilience.core.model import Model
    from consilience.models.adapted import Adapted
    from consilience.models.module import ModuleModel

    # A torch module becomes a model that begins with its weights.
    model = backbone if isinstance(backbone, Model) else ModuleModel(backbone)
    # One pattern is not a sequence of one-letter patterns.
    patterns = (layers,) if isinstance(layers, str) else layers
    return Adapted(model, outputs, bottleneck, patterns)


def frozen(model: M, patterns: Sequence[str] = ("*",)) -> M:
    """Return the same model with the entries that match one of the shell patterns frozen too.

    A part whose entries are all frozen runs in eval mode also in training: its batch norms keep their
    statistics and its dropouts are off.

    >>> import torch
    >>> model = frozen(mlp(4, (3,), 2), ("1.*",))
    >>> [n for n in model.init(torch.Generator())[0] if model.frozen(n)]
    ['1.weight', '1.bias']
    """
    return model.freeze((patterns,) if isinstance(patterns, str) else tuple(patterns))


def head2toe(
    model: MultiHead | Toes,
    params: Params,
    buffers: Params,
    source: Source,
    keep: float = 0.01,
    by: Literal["biases", "lasso"] | None = None,
    pool: int = 1,
    penalty: float = 1e-3,
    epochs: int = 100,
    lr: float = 1e-3,
    batch: int = 32,
    seed: int = 0,
) -> tuple[Toes, Params, Params]:
    """Train a head for the source's task that reads a few chosen channels of all layers.

    By biases: it reads the channels of the `keep` largest |B| of the task's trained beneficial biases,
    averaged, and the task's logits. By lasso: of the averaged channels of every layer and the features, each
    layer divided by its L2 norm, it reads those with the `keep` largest ||W_i||_2 in a linear head that is
    trained first, with cross entropy + `penalty` sum_i ||W_i||_2. Images pass the backbone once. All inputs
    of a head are held in memory: by lasso 4 bytes per image and channel of all layers. Evci et al. 2022; by
    biases: Ge et al. 2023, section 7.3.

    Args:
        model: `multi_head` on a frozen trunk, `beneficial_biases`, or the model returned for another task.
        params, buffers: of the model, with the head (and the trained biases) of the source's task.
        source: images; `validation`, where it has some, chooses among the epochs.
        keep: the fraction of channels (by biases) or of averages (by lasso) to keep.
        by: None: biases, where the model has them, else lasso.
        pool: each channel is averaged on a grid of this side.
        penalty: the strength of the group lasso.
        epochs, lr, batch: of Adam, also for the lasso.
        seed: of first weights and orders.

    Returns:
        The model, and its parameters and buffers with those of the new head.

    Raises:
        ConsilienceError: the task has no head or no biases to choose by; numbers out of range; targets that
            are not the head's columns; a layer that does not give a row for each image.

    >>> import torch
    >>> from consilience.data import digits
    >>> model, source = multi_head(frozen(conv(3, 1, 8, 4)), 10), digits(image=True)
    >>> params, buffers = model.init(torch.Generator().manual_seed(0))
    >>> params, buffers = model.grow(params, buffers, source, torch.Generator())
    >>> model, params, buffers = head2toe(model, params, buffers, source, keep=0.5, epochs=1)
    >>> buffers["toes.digits.index"].shape, params["toes.digits.weight"].shape
    (torch.Size([22]), torch.Size([10, 22]))
    """
    from consilience.models import toes

    # They are checked as a whole before any image passes the backbone.
    options = toes.Options(keep, by, pool, penalty, epochs, lr, batch, seed)
    return toes.fit(model, params, buffers, source, options)


def sharing(
    model: Model, params: Params, buffers: Params, sources: Sequence[Source]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Measure how each task mixes what tasks share, on training data: gates, cross-stitches, alphas.

    Of a result: `sharing(result.agent.model, result.params, result.agent.state.buffers, sources)`; the last
    state of a run is in `result.sharing`, and in the report.

    Returns:
        {task: {place: {"parts": names, "weights": their means, "entropy": of gates, in nats}}}. The entropy
        is the mean over samples of -sum_i w_i log w_i, None where weights are no probabilities. At most
        10,000 examples per source are read. Empty for models that mix nothing.

    >>> import torch
    >>> from consilience.data import digits
    >>> model, source = mmoe(mlp(64, (8,)), 10, experts=2), digits()
    >>> entries = model.grow(*model.init(torch.Generator()), source, torch.Generator())
    >>> sharing(model, *entries, [source])["digits"]["layer 0"]["parts"]
    ['expert 0.0', 'expert 0.1']
    """
    from consilience.core.sharing import patterns

    return patterns(model, params, buffers, sources)


def linearised(model: Model, base: Params | None = None) -> Tangent:
    """Make a model linear in its parameters: f(x; theta_0) + J(x; theta_0) (theta - theta_0).

    J is the Jacobian at theta_0. theta begins at theta_0 and is trained; theta_0 is frozen. Sums of task
    vectors are then sums of functions: fine-tuning for merging (Ortiz-Jimenez et al. 2023). It costs about
    two forward passes instead of one, and runs in eval mode also in training.

    Args:
        model: any model; heads that it adds are linearised too (freeze what must not move before).
        base: theta_0, such as a pretrained state dict; buffers in it (the statistics of batch norm) are used
            too. None: the model's first parameters. As `base` of a setting, give
            `linearised(model).at(params)`.

    Raises:
        ConsilienceError: `base` lacks one of the model's entries, or the model is linearised already.

    >>> import torch
    >>> model, generator = mlp(4, (3,), 2), torch.Generator().manual_seed(0)
    >>> params, buffers = linearised(model).init(generator)
    >>> x = torch.ones(1, 4)
    >>> first_order = linearised(model)(params, buffers, x, None, True)[0]
    >>> torch.equal(first_order, model(params, buffers, x, None, True)[0])
    True
    """
    from consilience.models.tangent import Tangent

    return Tangent(model, base)


def joint(module: nn.Module | Callable[[], nn.Module], widths: Mapping[str, int], earlier: int = 0) -> Joint:
    """Return a model of a module that answers several tasks: x -> {task: outputs [B, k, *places]}.

    Tasks may differ in their places: one answer per image and one per pixel, or per text and per token. A
    task's outputs may be a tuple: the answer, and then earlier answers of its shape, which
    `methods.deep_supervision` trains. An entry on which the answers of one task alone depend is left to its
    gradient by aggregators such as PCGrad.

    Args:
        module: the module, or a function of no arguments that makes one.
        widths: the number k of outputs of each task: classes, values or labels.
        earlier: how many earlier answers each task has.

    >>> import torch
    >>> class Two(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.trunk, self.digit, self.ink = (torch.nn.Linear(4, k) for k in (4, 3, 1))
    ...     def forward(self, x):
    ...         h = self.trunk(x).relu()
    ...         return {"digit": self.digit(h), "ink": self.ink(h)}
    >>> joint(Two, {"digit": 3, "ink": 1}).outputs
    4
    """
    from consilience.models.answers import Joint

    return Joint(module, widths, earlier)


def pad_net(widths: Mapping[str, int], channels: int = 3, width: int = 16) -> Joint:
    """Return PAD-Net on a small encoder and decoder, for images [B, channels, H, W] and a target per pixel.

    Each task answers from the shared maps; spatial attention distils the maps behind these answers between
    the tasks; and each task answers again from what it got. `methods.deep_supervision` trains the first
    answers too, as the paper does. Xu, Ouyang, Wang & Sebe 2018, arXiv:1805.04409.

    Args:
        widths: the number of outputs of each task: classes, values or labels.
        channels: of the images.
        width: of the maps in full size.

    >>> import torch
    >>> model = pad_net({"seg": 3, "depth": 1}, channels=1, width=4)
    >>> model.outputs, model.earlier
    (8, 1)
    """
    return _distilled("pad_net", widths, channels, width, 1)


def mti_net(widths: Mapping[str, int], channels: int = 3, width: int = 16) -> Joint:
    """Return MTI-Net on a small encoder: `pad_net` with answers and distillation at three scales.

    Maps of tasks pass from each scale to the next finer one, and the last answers read all scales.
    Vandenhende, Georgoulis & Van Gool 2020, arXiv:2001.06902. Arguments are those of `pad_net`.

    >>> mti_net({"seg": 3, "depth": 1}, channels=1, width=4).earlier
    3
    """
    return _distilled("mti_net", widths, channels, width, 3)


def _distilled(name: str, widths: Mapping[str, int], channels: int, width: int, scales: int) -> Joint:
    from consilience.core.checks import whole_number
    from consilience.models import dense
    from consilience.models.answers import Joint

    whole_number(channels=channels, width=width)
    # A copy: the module is made again whenever parameters are.
    kept = dict(widths)
    return Joint(lambda: dense.Distilled(kept, channels, width, scales), kept, scales, name=name)


def multi_net(
    images: Mapping[str, int] | None = None,
    pixels: Mapping[str, int] | None = None,
    cells: Mapping[str, int] | None = None,
    channels: int = 3,
    width: int = 16,
) -> Joint:
    """Return MultiNet: one small encoder for answers per image, per pixel, and per cell of 4 x 4 pixels.

    Images are [B, channels, H, W] with H and W divisible by 4. Cells [B, k, H / 4, W / 4] detect: a task of
    kind "labels" says whether a cell has an object, and one of kind "value" where its box is
    (`data.cell_targets`). Teichmann et al. 2018, arXiv:1612.07695.

    Args:
        images, pixels, cells: the numbers of outputs by task.
        channels: of the images.
        width: of the maps in full size.

    >>> multi_net({"scene": 3}, {"road": 2}, {"car": 1, "box": 4}, width=4).outputs
    10
    """
    from consilience.core.checks import whole_number
    from consilience.models import dense
    from consilience.models.answers import Joint

    whole_number(channels=channels, width=width)
    parts = [dict(given or {}) for given in (images, pixels, cells)]
    names = [task for part in parts for task in part]
    # A task has answers of one kind, and its name is the key to them.
    if len(set(names)) < len(names):
        raise ConsilienceError(f"tasks must have names of their own, got {', '.join(names)}.")
    widths = {task: k for part in parts for task, k in part.items()}
    images, pixels, cells = parts
    return Joint(lambda: dense.MultiNet(images, pixels, cells, channels, width), widths, name="multi_net")


def recommender(
    ids: Sequence[int],
    widths: Mapping[str, int],
    numbers: int = 0,
    chain: tuple[str, str] | None = None,
    embedding: int = 8,
    hidden: Sequence[int] = (64,),
) -> Joint:
    """Return a model of clicks, purchases and engagement on sparse ids: embeddings, a trunk, towers.

    Inputs are a mapping: `ids` [B, tables], whole numbers (`data.ids` makes them of names), and `numbers`
    [B, d] if there are any. With `chain` it is ESMM: P(click and buy) = P(click) P(buy after click), where
    both sides are trained on all impressions, and never on clicks alone; the rate of purchases after a click
    is the ratio of the two predictions, for impressions without a click too. Ma et al. 2018,
    arXiv:1804.07931.

    Args:
        ids: the rows of each embedding table: ids are below them.
        widths: the number of outputs of each task: labels, values or classes.
        numbers: d, the numbers of an impression.
        chain: (task, task that happens only after it), such as ("click", "buy"): the targets of the second
            are 1 where both happened.
        embedding: the width of the embeddings.
        hidden: the widths of the trunk.

    >>> model = recommender([100, 50], {"click": 1, "buy": 1, "dwell": 1}, numbers=3, chain=("click", "buy"))
    >>> model.outputs, sum(name.startswith("tables.") for name in model.entries)
    (3, 2)
    """
    from consilience.core.checks import whole_number
    from consilience.models.answers import Joint
    from consilience.models.recommend import Recommender

    for rows in ids:
        whole_number(ids=rows)
    whole_number(embedding=embedding)
    whole_number(0, numbers=numbers)
    for width in hidden:
        whole_number(hidden=width)
    # Copies: the function that makes the module runs again whenever parameters are made.
    kept, tables, layers = dict(widths), tuple(ids), tuple(hidden)
    if chain is not None and (len(chain) != 2 or any(kept.get(task) != 1 for task in chain)):
        raise ConsilienceError(f"`chain` must be two tasks of one output each of `widths`, got {chain!r}.")
    if not tables and not numbers:
        raise ConsilienceError("a recommender needs `ids` or `numbers`, got neither.")
    return Joint(
        lambda: Recommender(tables, numbers, kept, chain, embedding, layers), kept, name="recommender"
    )


def wrap(
    module: nn.Module | Callable[[], nn.Module],
    outputs: int | None = None,
    head: str | None = None,
    frozen: Sequence[str] = (),
    headless: bool = False,
) -> ModuleModel:
    """Return a model of any torch module x -> outputs [B, C].

    A module is copied with its weights; a function that makes one makes new weights for each seed. Entries
    with `requires_grad=False` are frozen: they are neither trained, sent nor saved, and stay in the memory of
    the module that is given, where nobody may change them.

    Args:
        module: the module, or a function of no arguments that makes one.
        outputs: the number of output columns (of features, if headless); None: the head's, or, for a headless
            module, the number that `backbone` counts. Give it for a module that does not end in an nn.Linear,
            such as a segmentation net.
        head: the name of the last linear layer, whose inputs are the features; None: the last nn.Linear in
            module order.
        frozen: shell patterns of further entries that never change.
        headless: the outputs are features, and there is no head.

    >>> import torch
    >>> model = wrap(torch.nn.Linear(4, 3), frozen=("bias",))
    >>> model.outputs, model.head({}, None), model.frozen("bias")
    (3, ('weight', 'bias'), True)
    """
    from consilience.models.module import ModuleModel

    # One pattern is not a sequence of one-letter patterns.
    patterns = (frozen,) if isinstance(frozen, str) else tuple(frozen)
    return ModuleModel(module, outputs, head, patterns, headless)


suggest_arguments(__name__)
