"""Distillation: a trained teacher shows the network what it makes of each sample, beside the labels.

Hinton et al. 2015, arXiv 1503.02531, on outputs; Zhao et al. 2022, arXiv 2203.08679, on outputs taken apart; Romero et
al. 2014, arXiv 1412.6550 (FitNets), on features; Zagoruyko and Komodakis 2016, arXiv 1612.03928, on attention.
The teacher sees the same augmented samples, in evaluation mode; no checkpoint, optimizer or process group knows it.
Letters: B batch, K classes, R the other K - 1 classes, C channels, H height, W width, N tokens, D features.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from typing import Any, ClassVar, Literal

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espalier.compression.base import Compression, Stage
from espalier.compression.graph_module import CapturedNet
from espalier.config.hints import nearest
from espalier.config.ranges import NonNegative, Positive, Share
from espalier.errors import ConfigError
from espalier.learners.learner import Learner
from espalier.seeding import generator
from espalier.signature import example
from espalier.spec import DataSpec, Entry
from espalier.targets.kinds import kind_of
from espalier.targets.metrics import distillation

ADAPTER_STREAM = 0xADA  # keeps the first weights of adapters apart from other users of the seed

Adapter = Sequence[Any]  # [channels of the student, channels of the teacher, "conv" or "linear"]
Read = Callable[[], Mapping[str, Any]]  # outputs of the watched modules in the last forward pass, by path


def decoupled(
    student_BK: Tensor, teacher_BK: Tensor, y: Tensor, temperature: float, alpha: float, beta: float
) -> Tensor:
    """Return `alpha` * KL(target or not) + `beta` * KL(among the others), else as `distillation`.

    `distillation` itself has alpha 1 and beta 1 - p, where p is the teacher's probability of the target: the surer the
    teacher, the less is learnt from what it thinks of other classes (Zhao et al. 2022, equations 6 and 7,
    arxiv.org/abs/2203.08679). Targets are classes (B,); of probabilities (B, K) the largest is the target.
    """
    y_B = y if y.ndim == 1 else y.argmax(1)
    (our_target_B2, our_others_BR), (their_target_B2, their_others_BR) = (
        _apart(logits_BK / temperature, y_B) for logits_BK in (student_BK, teacher_BK)
    )
    target = distillation(our_target_B2, their_target_B2, 1.0)
    others = distillation(our_others_BR, their_others_BR, 1.0)
    return (alpha * target + beta * others) * temperature**2


def _apart(logits_BK: Tensor, y_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits of (target, any other class), and those of the others, from the target on, wrapping around."""
    num_classes = logits_BK.shape[1]
    offset_K = torch.arange(num_classes, device=y_B.device)
    target_B1, others_BR = logits_BK.gather(1, (y_B[:, None] + offset_K) % num_classes).tensor_split([1], dim=1)
    return torch.cat((target_B1, others_BR.logsumexp(1, keepdim=True)), dim=1), others_BR


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared error of features of one shape, the student's after its adapter; scalar.

    The hint of FitNets (Romero et al. 2014, equation 3, arxiv.org/abs/1412.6550), all along and not as a first phase.
    """
    return F.mse_loss(student, teacher)


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared distance, in [0, 2], of the two normalised `attention_map`s, mean over the batch; scalar.

    The teacher's map is averaged, or repeated, to the size of the student's. Zagoruyko and Komodakis 2016, section 3.1,
    arxiv.org/abs/1612.03928; the authors' code (github.com/szagoruyko/attention-transfer) weighs it by 1000 / (H W).
    """
    ours_BHW, theirs_BHW = attention_map(student), attention_map(teacher)
    height, width = ours_BHW.shape[1:]
    theirs_BHW = F.adaptive_avg_pool2d(theirs_BHW, (height, width))  # no gradient: deterministic on GPUs
    return (F.normalize(ours_BHW.flatten(1)) - F.normalize(theirs_BHW.flatten(1))).square().sum(1).mean()


def attention_map(features: Tensor) -> Tensor:
    """Return the mean square over the channels of maps (B, C, H, W), or of tokens (B, N, D) as one row; (B, H, W)."""
    return features.square().mean(1) if features.ndim == 4 else features.square().mean(2)[:, None]


class Distill(Compression):
    """Trains on `(1 - weight) * loss + weight * soft_loss`, and on what the layers of student and teacher share.

    Layers are named by the path that both networks have for them. Each of `features` adds `feature_weight` times its
    `feature_loss`, through a trained 1x1 adapter where the channels differ in number; each of `attention` adds
    `attention_weight` times its `attention_loss`. The soft loss of a regression is the squared error to the teacher.
    """

    stage: ClassVar[Stage] = Stage.DISTILL

    def __init__(
        self,
        teacher: str,
        weight: Share,
        soft_loss: Literal["logits", "decoupled"],
        temperature: Positive,
        alpha: NonNegative,
        beta: NonNegative,
        features: Sequence[str],
        feature_weight: NonNegative,
        attention: Sequence[str],
        attention_weight: NonNegative,
        spec: DataSpec,
        seed: int,
        network: Callable[[str, str], nn.Module],
    ) -> None:
        if soft_loss == "decoupled" and not kind_of(spec).has_probabilities:
            raise ConfigError(
                f"compression.distill.soft_loss=decoupled: takes classes apart, but data {spec.name} has none; "
                "use logits"
            )
        if not weight and not features and not attention:
            raise ConfigError(
                "compression.distill.weight=0.0: leaves the teacher nothing to say; "
                "choose a larger one, or list features or attention"
            )
        self.teacher = network("compression.distill.teacher", teacher)
        self.weight = weight
        self.soft_loss = soft_loss
        self.temperature = temperature
        self.alpha = alpha
        self.beta = beta
        self.features = features
        self.feature_weight = feature_weight
        self.attention = attention
        self.attention_weight = attention_weight
        self.spec = spec
        self.seed = seed
        self.undo = ExitStack()  # takes hooks and the objective back, also after an exception

    def require(self, model: nn.Module) -> None:
        self._adapters(model)

    def apply(self, model: nn.Module) -> tuple[nn.Module, Entry]:
        entry = {"adapters": self._adapters(model)}
        model = self.replay(model, entry)
        for place, (path, (in_channels, *_)) in enumerate(entry["adapters"].items()):
            adapter: Any = model.get_submodule(f"adapters.{_name(path)}")
            noise = generator(self.seed, ADAPTER_STREAM, place)
            nn.init.normal_(adapter.weight, std=in_channels**-0.5, generator=noise)  # keeps the mean square
            nn.init.zeros_(adapter.bias)
        return model, entry

    @staticmethod
    def replay(model: nn.Module, entry: Mapping[str, Any]) -> nn.Module:
        """Add `model.adapters`, one for each feature that needs one; their weights are undefined."""
        if entry["adapters"]:
            model.adapters = nn.ModuleDict({_name(path): _adapter(*size) for path, size in entry["adapters"].items()})
        return model

    @staticmethod
    def finalize(model: nn.Module, entry: Mapping[str, Any]) -> nn.Module:
        """Remove the adapters."""
        if entry["adapters"]:
            del model.adapters
        return model

    def _adapters(self, model: nn.Module) -> dict[str, Adapter]:
        """Return an adapter for each feature that needs one; raise `ConfigError` for a path where nothing compares."""
        ours = self._outputs("this network", model)
        theirs = self._outputs("the teacher", self.teacher)
        for path in self.attention:
            if ours[path].ndim not in (3, 4) or ours[path].ndim != theirs[path].ndim:
                raise ConfigError(
                    f"compression.distill.attention={path}: gives {_shape(ours[path])} here and {_shape(theirs[path])} "
                    "in the teacher; name a module that gives maps (C, H, W) in both, or tokens (N, D)"
                )
        adapters: dict[str, Adapter] = {}
        for path in self.features:
            our_channels, our_positions = _channels_and_positions(ours[path])
            their_channels, their_positions = _channels_and_positions(theirs[path])
            if our_positions != their_positions:
                raise ConfigError(
                    f"compression.distill.features={path}: gives {_shape(ours[path])} here and {_shape(theirs[path])} "
                    "in the teacher; only channels may differ, so name another module, or use attention, which resizes"
                )
            if our_channels != their_channels:
                adapters[path] = [our_channels, their_channels, "conv" if ours[path].ndim == 4 else "linear"]
        return adapters

    def _outputs(self, owner: str, model: nn.Module) -> Mapping[str, Tensor]:
        """Return what the watched modules of a network, which stays as it is, give for one sample."""
        names = [name for name, _ in model.named_modules() if name]
        settings = [(setting, path) for setting in ("features", "attention") for path in getattr(self, setting)]
        for setting, path in settings:
            if path not in names:
                raise ConfigError(f"compression.distill.{setting}={path}: no module of {owner}{nearest(path, names)}")
        twin = deepcopy(model).eval()
        with ExitStack() as undo, torch.no_grad():
            read = watch(twin, [path for _, path in settings], undo)
            twin(*example(self.spec, 1))
            outputs = read()
        for setting, path in settings:
            if not isinstance(outputs.get(path), Tensor):
                raise ConfigError(
                    f"compression.distill.{setting}={path}: no tensor comes out of this module of {owner}; name another"
                )
        return outputs

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Learner)
        self.teacher.to(pl_module.device, pl_module.dtype)  # type: ignore[arg-type]
        paths = list(dict.fromkeys((*self.features, *self.attention)))
        ours, theirs = (watch(model, paths, self.undo) for model in (pl_module.model, self.teacher))
        pl_module.objective = partial(self.objective, pl_module, ours, theirs)  # type: ignore[method-assign]
        self.undo.callback(delattr, pl_module, "objective")

    def objective(
        self, learner: Learner, ours: Read, theirs: Read, inputs: Sequence[Tensor], output: Tensor, y: Tensor
    ) -> Tensor:
        """Return the weighted loss on labels, outputs and layers; replaces `Learner.objective` during the fit."""
        with torch.no_grad():
            target = self.teacher(*inputs)
        loss = (1 - self.weight) * learner.training_loss(output, y)
        loss = loss + self.weight * self._soft_loss(output.float(), target.float(), y)
        student, teacher = ours(), theirs()
        for path in self.features:
            adapted = _adapted(learner.model, path, student[path])
            loss = loss + self.feature_weight * feature_loss(adapted.float(), teacher[path].float())
        for path in self.attention:
            attended = attention_loss(student[path].float(), teacher[path].float())
            loss = loss + self.attention_weight * attended
        return loss

    def _soft_loss(self, student: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
        if self.soft_loss == "decoupled":
            return decoupled(student, teacher, y, self.temperature, self.alpha, self.beta)
        return kind_of(self.spec).distance(student, teacher, self.temperature)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.undo.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.undo.close()  # Lightning tears down nothing then


def watch(model: nn.Module, paths: Sequence[str], undo: ExitStack) -> Read:
    """Keep the outputs of the modules at `paths` in each forward pass, until `undo` is closed."""
    if isinstance(model, CapturedNet):  # runs a graph and no hooks
        model.watch(paths)
        undo.callback(model.watch, ())
        return lambda: model.watched
    outputs: dict[str, Any] = {}

    def keep(path: str, module: nn.Module, inputs: Any, output: Any) -> None:
        outputs[path] = output

    for path in paths:
        undo.callback(model.get_submodule(path).register_forward_hook(partial(keep, path)).remove)
    return lambda: outputs


def _adapter(in_channels: int, out_channels: int, kind: str) -> nn.Module:
    if kind == "conv":
        return nn.utils.skip_init(nn.Conv2d, in_channels, out_channels, 1)  # draws no random number
    return nn.utils.skip_init(nn.Linear, in_channels, out_channels)


def _adapted(model: nn.Module, path: str, features: Tensor) -> Tensor:
    adapters = getattr(model, "adapters", {})
    return adapters[_name(path)](features) if _name(path) in adapters else features


def _name(path: str) -> str:
    """Return a path as the name of one module."""
    return path.replace(".", "__")


def _channels_and_positions(features: Tensor) -> tuple[int, tuple[int, ...]]:
    """Return channels and positions of maps (B, C, H, W), of tokens (B, N, D) or of vectors (B, D)."""
    shape = features.shape
    return (shape[1], shape[2:]) if len(shape) == 4 else (shape[-1], shape[1:-1])


def _shape(features: Tensor) -> str:
    """Return the shape of one sample as text: 16 x 8 x 8."""
    return " x ".join(map(str, features.shape[1:]))
