"""The catalogue of models: inputs [B, ...] -> outputs [B, C] as pure functions of parameters and buffers.

Nothing here imports torch before it is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from consilience import lazy
from consilience.core.errors import ConsilienceError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor, nn

    from consilience.core.model import Model
    from consilience.core.params import Params
    from consilience.core.source import Source
    from consilience.models.adapted import Adapted as Adapted
    from consilience.models.biased import Biased as Biased
    from consilience.models.columns import Progressive as Progressive
    from consilience.models.heads import MultiHead as MultiHead
    from consilience.models.module import ModuleModel as ModuleModel
    from consilience.models.tangent import Tangent as Tangent
    from consilience.models.toes import Toes as Toes

    M = TypeVar("M", ModuleModel, MultiHead)
else:
    __getattr__, __dir__ = lazy.attach(__name__)

__all__ = [
    "adapters",
    "backbone",
    "beneficial_biases",
    "char_lstm",
    "char_transformer",
    "conv",
    "fourier_features",
    "frozen",
    "head2toe",
    "lenet",
    "linear",
    "linearised",
    "macs",
    "mlp",
    "multi_head",
    "progressive",
    "progressive_conv",
    "random_features",
    "resnet",
    "wrap",
]


def linear(inputs: int, outputs: int = 10) -> ModuleModel:
    """W x + b of the flattened inputs [B, inputs].

    >>> import torch
    >>> sorted(linear(4, 3).init(torch.Generator())[0])
    ['1.bias', '1.weight']
    """
    return mlp(inputs, (), outputs)._named(f"linear({inputs}, {outputs})")


def mlp(inputs: int, hidden: Sequence[int] = (128,), outputs: int = 10) -> ModuleModel:
    """A perceptron on the flattened inputs [B, inputs], with ReLU between its layers.

    >>> import torch
    >>> model = mlp(64, (32,), 10)
    >>> params, buffers = model.init(torch.Generator().manual_seed(0))
    >>> model(params, buffers, torch.zeros(2, 8, 8), None, False)[0].shape
    torch.Size([2, 10])
    """
    _positive(inputs=inputs, outputs=outputs)
    for width in hidden:
        _positive(hidden=width)
    from consilience.models import nets
    from consilience.models.module import ModuleModel

    widths = tuple(hidden)
    return ModuleModel(
        lambda: nets.mlp(inputs, widths, outputs), outputs, name=f"mlp({inputs}, {widths}, {outputs})"
    )


def lenet(outputs: int = 10, channels: int = 1, size: int = 28) -> ModuleModel:
    """LeNet-5 with ReLU and max pooling, on square images [B, channels, size, size]. LeCun et al. 1998.

    >>> lenet().head({}, None)
    ('11.weight', '11.bias')
    """
    _positive(outputs=outputs, channels=channels)
    if size < 12:
        raise ConsilienceError(f"`size` should be at least 12. Found `size = {size}`.")
    from consilience.models import nets
    from consilience.models.module import ModuleModel

    return ModuleModel(
        lambda: nets.lenet(outputs, channels, size), outputs, name=f"lenet({outputs}, {channels}, {size})"
    )


def conv(outputs: int = 10, channels: int = 1, size: int = 28, width: int = 32) -> ModuleModel:
    """Two 3 x 3 convolutions (`width` and 2 `width` maps) with ReLU and pooling, then a linear head; [B, channels, size, size].

    >>> conv(size=8, width=4).width
    32
    """
    _positive(outputs=outputs, channels=channels, width=width)
    if size < 4:
        raise ConsilienceError(f"`size` should be at least 4. Found `size = {size}`.")
    from consilience.models import nets
    from consilience.models.module import ModuleModel

    name = f"conv({outputs}, {channels}, {size}, {width})"
    return ModuleModel(lambda: nets.conv(outputs, channels, size, width), outputs, name=name)


def resnet(
    depth: Literal[18, 20] = 20,
    outputs: int = 10,
    channels: int = 3,
    norm: Literal["group", "batch"] = "group",
    width: int = 16,
) -> ModuleModel:
    """A residual network for small images [B, channels, H, W]: CIFAR's ResNet-20, or a ResNet-18 whose stem keeps the size.

    The usual ResNet-18 has `width=64`. Shortcuts that change shape are 1 x 1 convolutions. He et al. 2016. Group norm
    (at most 8 groups) makes samples independent of their batch, which averages and vmap want; Wu and He 2018.

    >>> resnet().has_batch_norm, resnet(norm="batch").has_batch_norm
    (False, True)
    """
    _positive(outputs=outputs, channels=channels, width=width)
    if depth not in (18, 20):
        raise ConsilienceError(f"`depth` should be 18 or 20. Found `depth = {depth}`.")
    if norm not in ("group", "batch"):
        raise ConsilienceError(f"`norm` should be 'group' or 'batch'. Found `norm = {norm!r}`.")
    from consilience.models import nets
    from consilience.models.module import ModuleModel

    name = f"resnet({depth}, {outputs}, {channels}, {norm!r}, {width})"
    return ModuleModel(lambda: nets.ResNet(depth, outputs, channels, norm, width), outputs, name=name)


def char_lstm(outputs: int = 64, embedding: int = 8, hidden: int = 128, layers: int = 1) -> ModuleModel:
    """The next of `outputs` characters after x [B, T] of them (whole numbers): embedding, LSTM, linear head on its last state.

    McMahan et al. 2017 have 2 layers of 256. Same equations as nn.LSTM, in plain operations, so that many clients run at once.

    Args:
        outputs: characters that there are.
        embedding: numbers a character becomes.
        hidden: units of a layer.
        layers: of the LSTM.

    >>> import torch
    >>> model = char_lstm(10, 4, 6)
    >>> model(*model.init(torch.Generator()), torch.zeros(2, 5, dtype=torch.long), None, False)[0].shape
    torch.Size([2, 10])
    """
    _positive(outputs=outputs, embedding=embedding, hidden=hidden, layers=layers)
    from consilience.models import nets
    from consilience.models.module import ModuleModel

    name = f"char_lstm({outputs}, {embedding}, {hidden}, {layers})"
    return ModuleModel(lambda: nets.CharLSTM(outputs, embedding, hidden, layers), outputs, name=name)


def char_transformer(
    outputs: int = 64, window: int = 80, width: int = 64, heads: int = 4, layers: int = 2
) -> ModuleModel:
    """The next of `outputs` characters after x [B, T <= window] (whole numbers): a causal transformer, pre-norm, with learned places.

    Args:
        outputs: characters that there are.
        window: characters that it can see.
        width: of a place's state; a multiple of `heads`.
        heads: of attention.
        layers: blocks of attention and a perceptron of 4 x `width`.

    >>> import torch
    >>> model = char_transformer(10, 5, 8, 2, 1)
    >>> model(*model.init(torch.Generator()), torch.zeros(2, 5, dtype=torch.long), None, False)[0].shape
    torch.Size([2, 10])
    """
    _positive(outputs=outputs, window=window, width=width, heads=heads, layers=layers)
    if width % heads:
        raise ConsilienceError(
            f"`width` should be a multiple of `heads`. Found `width = {width}` and `heads = {heads}`."
        )
    from consilience.models import nets
    from consilience.models.module import ModuleModel

    name = f"char_transformer({outputs}, {window}, {width}, {heads}, {layers})"
    return ModuleModel(
        lambda: nets.CharTransformer(outputs, window, width, heads, layers), outputs, name=name
    )


def random_features(inputs: int, width: int = 512, seed: int = 0) -> ModuleModel:
    """Frozen random ReLU features psi(x) = max(W x + b, 0) [B, width] of flattened inputs in [0, 1]; no head.

    W ~ N(0, 12 / inputs), so that W x has unit variance over the unit cube; b = -W c, so that the kink of each feature
    passes through a point c of the cube, uniform on the segment from 0 to a uniform point. They depend on `seed` alone:
    every run and every agent has the same backbone. Rahimi and Recht 2008.

    >>> import torch
    >>> model = random_features(4, 8)
    >>> model.backbone(model.init(torch.Generator())[0]) == model.backbone(model.init(torch.Generator().manual_seed(1))[0])
    True
    """
    _positive(inputs=inputs, width=width)
    from consilience.models import nets
    from consilience.models.module import ModuleModel

    name = f"random_features({inputs}, {width}, {seed})"
    return ModuleModel(
        nets.random_features(inputs, width, seed), width, frozen=("*",), headless=True, name=name
    )


def fourier_features(model: ModuleModel, width: int = 2048, sigma: float = 1.0, seed: int = 0) -> ModuleModel:
    """The model with random Fourier features between its features psi [B, d] and a new head: sqrt(2 / D) cos(Omega psi + b) [B, D].

    Omega ~ N(0, 1 / sigma^2), b uniform in [0, 2 pi), frozen and drawn by `seed` alone, so that all agents have the same: inner
    products are the Gaussian kernel exp(-|psi - psi'|^2 / (2 sigma^2)), up to 1 / sqrt(D). With `methods.fed3r` it is Fed3R with
    random features, of the model's own parameters as they begin (`frozen` keeps them so in other methods). Rahimi and Recht 2007.

    Args:
        model: one of one module, whose head is taken off.
        width: D, the number of features.
        sigma: of the kernel; about the median distance of features.
        seed: of Omega and b.

    Raises:
        ConsilienceError: `width` < 1, or `sigma` not positive.

    >>> import torch
    >>> model = fourier_features(mlp(4, (8,), 3), 16)
    >>> model.width, [n for n in model.init(torch.Generator())[0] if model.frozen(n)], model.outputs
    (16, ['fourier.weight', 'fourier.bias'], 3)
    """
    _positive(width=width)
    if not 0 < sigma < float("inf"):
        raise ConsilienceError(f"`sigma` should be positive and finite. Found `sigma = {sigma}`.")
    import copy

    from consilience.models import nets
    from consilience.models.module import ModuleModel

    if not isinstance(model, ModuleModel):
        raise ConsilienceError(f"`model` should be a model of one module. Found {type(model).__name__}.")
    body, outputs = model.body(), model.outputs
    own, factory, d = body._module, body._factory, body.width
    frozen = [f"body.{n}" for n in body._names if body.frozen(n)]
    name = f"fourier_features({model.description}, {width}, {sigma}, {seed})"

    def make() -> nn.Module:
        return nets.Fourier(factory() if factory else copy.deepcopy(own), d, width, sigma, seed, outputs)

    return ModuleModel(make, outputs, head="head", frozen=("fourier.*", *frozen), name=name)


def backbone(
    of: str | nn.Module | Model,
    checkpoint: str | Path | None = None,
    size: int | tuple[int, int] | Literal["own"] | None = "own",
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    **more: Any,
) -> ModuleModel:
    """Frozen features psi(x) [B, d] of images x [B, 1 or c, H, W] in [0, 1], by a `timm` model or any torch module; no head.

    Images are resized to `size` (bilinear, antialiased where they shrink), grey ones repeated to c channels, then (x - mean) / std.
    Its own features [B, d] are given back as they are, so that agents with images and agents with features that `data.embed` kept
    have one model. It runs in eval mode always. Its hash (`Model.backbone`) covers weights, buffers, `size`, mean, std and what the
    module is. For other modules than timm's, that is what torch prints of them, and their parts' classes
    and plain public attributes.

    Args:
        of: a name of timm's (`consilience[vision]`), a torch module (its last linear layer is taken off; without any, its outputs are
            the features), or a model of one (`wrap(.., headless=True)` keeps its last layer; `outputs` need not be given).
        checkpoint: weights as a safetensors file, read as float32; None: timm's from the hub, a module's own.
        size: height and width (one number: both); "own": timm's for this model, else as the images come; None: as they come.
        mean, std: of each channel, or one number for all; None: timm's for this model, else 0 and 1.
        more: for `timm.create_model`; with `pretrained=False` the weights are random, the same ones always.

    Raises:
        ConsilienceError: no timm, no such name, entries that the checkpoint lacks or has too many of (the classifier's do not
            matter), a std that is not positive, a body that does not take images of `size`.

    >>> import torch
    >>> model = backbone(conv(3, 3, 8, 4), size=8, mean=0.5, std=0.5)
    >>> params, buffers = model.init(torch.Generator())
    >>> psi = model(params, buffers, torch.rand(2, 1, 12, 12), None, True)[0]
    >>> model.width, torch.equal(model(params, buffers, psi, None, False)[0], psi)
    (32, True)
    """
    from consilience.models import pretrained

    if isinstance(of, str):
        return pretrained.of_timm(of, checkpoint, size, mean, std, more)
    if more:
        raise ConsilienceError(
            f"options should be timm's, for a model by name. Found {', '.join(sorted(more))}."
        )
    return pretrained.of_module(of, checkpoint, size, mean, std)


def macs(model: Model | nn.Module, sample: Tensor | Sequence[int], task: str | None = None) -> int:
    """Multiply-accumulates of one forward pass of one sample: half the FLOPs of matrix products and convolutions, as torch counts them.

    Additions, activations and norms are not counted. Training costs about three times as much, or less where layers are frozen.

    Args:
        model: a model as it begins, or a torch module.
        sample: samples [B, ..], or the shape (..) of one.
        task: which the model is told.

    >>> macs(mlp(4, (8,), 3), (4,))
    56
    """
    from consilience.models.module import count

    return count(model, sample, task)


def multi_head(trunk: ModuleModel, outputs: int, norm: Literal["inf"] | None = None) -> MultiHead:
    """One linear head for each task, on the features of a trunk whose own head is taken off; C = `outputs`.

    Args:
        trunk: a model of one module; its head is taken off.
        outputs: the number of output columns; each head has those of its task's classes.
        norm: "inf": logits psi (W / ||W||_inf)^T + b, each row by its own largest magnitude, trained through the division, so that
            rows of several heads can stand together.

    >>> import torch
    >>> model = multi_head(random_features(4, 8), outputs=10)
    >>> model(*model.init(torch.Generator()), torch.zeros(2, 4), None, False)[0].sum().item()
    0.0
    """
    from consilience.models.heads import MultiHead

    return MultiHead(trunk, outputs, norm)


def beneficial_biases(
    backbone: ModuleModel | nn.Module, outputs: int, last: float = 1.0, norm: Literal["inf"] | None = None
) -> Biased:
    """A frozen backbone, and for each task a linear head and one bias B for each output channel of its convolutions and linear layers.

    y = Conv(x) + b + B, and for linear layers likewise; B begins at 0, as the backbone. With `methods.finetune` nothing is forgotten;
    with `methods.skill` biases and heads travel. Ge et al., "Lightweight Learner for Shared Knowledge Lifelong Learning", 2023.

    Args:
        backbone: a model of one module, or a torch module; its head is taken off.
        outputs: the number of output columns; each head has those of its task's classes.
        last: the fraction of the layers, from the end, that have biases, rounded up; 0 has none. Layers that a `models.backbone` never
            calls do not count.
        norm: of the heads, as in `multi_head`.

    >>> beneficial_biases(conv(3, size=8, width=4), 10, last=0.5).layers
    ('3',)
    """
    from consilience.core.model import Model
    from consilience.models.biased import Biased
    from consilience.models.module import ModuleModel

    return Biased(backbone if isinstance(backbone, Model) else ModuleModel(backbone), outputs, last, norm)


def progressive(
    inputs: int,
    hidden: Sequence[int] = (128,),
    outputs: int = 10,
    bottleneck: int | None = None,
    shrink: float = 1.0,
) -> Progressive:
    """One perceptron (a column) for each task on the flattened inputs [B, inputs], which reads the layers of the earlier ones.

    Rusu et al. 2016.

    Args:
        inputs: of a sample.
        hidden: the units of the layers of the first column.
        outputs: the number of output columns; each head has those of its task's classes.
        bottleneck: units that a layer reads of all earlier columns; None takes as many as the layer before has.
        shrink: column k = 0, 1, .. has shrink^k times the units of the first, rounded.

    >>> progressive(4, (8, 8)).widths
    (8, 8)
    """
    _positive(inputs=inputs)
    from consilience.models.columns import Progressive

    return Progressive((inputs,), hidden, outputs, bottleneck, shrink)


def progressive_conv(
    outputs: int = 10,
    channels: int = 1,
    size: int = 28,
    width: int = 32,
    bottleneck: int | None = None,
    shrink: float = 1.0,
) -> Progressive:
    """One small convolutional net (a column) for each task, as `conv` has it, which reads the layers of the earlier ones.

    Two 3 x 3 convolutions (`width` and 2 `width` maps) with ReLU and pooling; [B, channels, size, size]. Rusu et al. 2016.

    Args:
        outputs: the number of output columns; each head has those of its task's classes.
        channels: of the images.
        size: the side of the images.
        width: the maps of the first layer of the first column.
        bottleneck: maps that a layer reads of all earlier columns; None takes as many as the layer before has.
        shrink: column k = 0, 1, .. has shrink^k times the maps of the first, rounded.

    >>> progressive_conv(size=8, width=4).widths
    (4, 8)
    """
    _positive(channels=channels, width=width)
    if size < 4:
        raise ConsilienceError(f"`size` should be at least 4. Found `size = {size}`.")
    from consilience.models.columns import Progressive

    return Progressive((channels, size, size), (width, 2 * width), outputs, bottleneck, shrink)


def adapters(
    backbone: ModuleModel | nn.Module, outputs: int, bottleneck: int = 16, layers: Sequence[str] | None = None
) -> Adapted:
    """A frozen backbone, and for each task a linear head and residual bottlenecks h + U relu(V h) after its layers.

    With `methods.finetune` nothing is forgotten; with `methods.skill` adapters and heads travel. A backbone that was made by a
    function begins at random, from the seed; a torch module (or `wrap` of one) comes with its weights. Its own head is taken off.
    Houlsby et al. 2019, Rebuffi et al. 2017.

    Args:
        backbone: a model of one module, or a torch module.
        outputs: the number of output columns; each head has those of its task's classes.
        bottleneck: the rows of V.
        layers: shell patterns of names of layers or blocks (`*` also matches dots); None takes every convolution, linear layer and attention
            (of a `models.backbone` those that it calls).

    >>> adapters(resnet(width=4), 10, layers=("body.?",)).layers[:2]
    ('body.0', 'body.1')
    """
    from consilience.core.model import Model
    from consilience.models.adapted import Adapted
    from consilience.models.module import ModuleModel

    made = backbone if isinstance(backbone, Model) else ModuleModel(backbone)
    patterns = (layers,) if isinstance(layers, str) else layers
    return Adapted(made, outputs, bottleneck, patterns)


def frozen(model: M, patterns: Sequence[str] = ("*",)) -> M:
    """The same model with the entries that match one of the shell patterns frozen too.

    A part all of whose entries are frozen runs in eval mode also in training: its batch norms keep their statistics and
    its dropouts are off.

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
    """A head for the source's task that reads a few chosen channels of all layers: the model, and parameters and buffers with its.

    By biases: the channels of the `keep` largest |B| of the task's trained beneficial biases, averaged, and the task's logits. By
    lasso: the averaged channels of every layer and the features, each layer divided by its L2 norm; a linear head on all of them is
    trained with cross entropy + `penalty` sum_i ||W_i||_2, and the `keep` largest ||W_i||_2 stay. Then a linear head on what stays
    is trained by Adam. Images pass the backbone once; all that a head sees is held in memory, by lasso 4 bytes for each channel of all
    layers an image. Evci et al. 2022; by biases: Ge et al. 2023, section 7.3.

    Args:
        model: `multi_head` on a frozen trunk, `beneficial_biases`, or what this gave for another task.
        params, buffers: of it, with the head (and the trained biases) of the source's task.
        source: images; `validation`, where it has some, chooses among the epochs.
        keep: the fraction of channels (by biases) or of averages (by lasso) that stay.
        by: None: biases, where the model has them.
        pool: each channel is averaged on a grid of this side.
        penalty: of the group lasso.
        epochs, lr, batch: of Adam, also for the lasso.
        seed: of first weights and orders.

    Raises:
        ConsilienceError: the task has no head, no biases to choose by, numbers out of range, targets that are not the head's columns, a
            layer that does not give a row for each image.

    >>> import torch
    >>> from consilience.data import digits
    >>> model = multi_head(frozen(conv(3, 1, 8, 4)), 10)
    >>> params, buffers = model.grow(*model.init(torch.Generator().manual_seed(0)), digits(image=True), torch.Generator())
    >>> model, params, buffers = head2toe(model, params, buffers, digits(image=True), keep=0.5, epochs=1)
    >>> buffers["toes.digits.index"].shape, params["toes.digits.weight"].shape
    (torch.Size([22]), torch.Size([10, 22]))
    """
    from consilience.models import toes

    return toes.fit(model, params, buffers, source, keep, by, pool, penalty, epochs, lr, batch, seed)


def linearised(model: Model, base: Params | None = None) -> Tangent:
    """The model made linear in its parameters: f(x; theta_0) + J(x; theta_0) (theta - theta_0), J the Jacobian at theta_0.

    theta begins at theta_0 and is trained; theta_0 stays. Sums of task vectors are then sums of functions: fine-tuning for merging
    (Ortiz-Jimenez et al. 2023). It costs about two forward passes instead of one, and runs in eval mode also in training.

    Args:
        model: any model; of one that adds heads, these are linearised too (freeze what should not move before).
        base: theta_0, such as a pretrained state dict, whose buffers (the statistics of batch norm) are taken where they stand
            in it; None takes what the model begins with. As the `base` of a setting it wants `linearised(model).at(params)`.

    Raises:
        ConsilienceError: `base` lacks one of the model's entries, or the model is linearised already.

    >>> import torch
    >>> model, g = mlp(4, (3,), 2), torch.Generator().manual_seed(0)
    >>> params, buffers = linearised(model).init(g)
    >>> x = torch.ones(1, 4)
    >>> torch.equal(linearised(model)(params, buffers, x, None, True)[0], model(params, buffers, x, None, True)[0])
    True
    """
    from consilience.models.tangent import Tangent

    return Tangent(model, base)


def wrap(
    module: nn.Module | Callable[[], nn.Module],
    outputs: int | None = None,
    head: str | None = None,
    frozen: Sequence[str] = (),
    headless: bool = False,
) -> ModuleModel:
    """A model of any torch module x -> outputs [B, C]: a module is taken with its weights, a factory makes new ones for each seed.

    Args:
        module: the module, which is copied, or a function of no arguments that makes one.
        outputs: the number of output columns (of features, if headless); None takes the head's, and of a headless module leaves it to
            `backbone` to count.
        head: the name of the last linear layer, whose input are the features; None takes the last nn.Linear in module order.
        frozen: shell patterns of entries that never change.
        headless: the outputs are features, and there is no head.

    >>> import torch
    >>> model = wrap(torch.nn.Linear(4, 3), frozen=("bias",))
    >>> model.outputs, model.head({}, None), model.frozen("bias")
    (3, ('weight', 'bias'), True)
    """
    from consilience.models.module import ModuleModel

    return ModuleModel(
        module, outputs, head, (frozen,) if isinstance(frozen, str) else tuple(frozen), headless
    )


def _positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ConsilienceError(f"`{name}` should be at least 1. Found `{name} = {number}`.")
