"""One optimizer update: forward, loss, backward, clip, step, clamp, from one micro-batch or from several.

One micro-batch:

    images, texts -> model -> features -> loss over the global batch -> gradients -> verdict -> clip -> update

    texts are encoded first: the other ranks' fly here while the images are encoded, and the gradients of all texts fly
    back while the image tower's are computed

Several (--accum-freq k). The contrastive loss compares every image with every text, so the losses of k small batches
are not the loss of the big one. The chain rule is cut at the features instead (GradCache, Gao et al. 2021,
"Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"):

    1. features of all micro-batches, without gradient                   memory: features only
    2. the loss once, on all of them -> d loss / d features, d loss / d temperature
    3. each micro-batch again, with gradient, fed with its part of 2     memory: one micro-batch

which is the gradient of the big batch for every parameter, at the price of a second forward pass.

Nothing here waits for the device: metrics are returned as tensors on it.
Legend: B rank batch, E embedding, k micro-batches, R = k * B rows of this rank in the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from models.clip import ClipOutput
from training.data.batch import DeviceBatch
from training.distributed.collectives import GatheredRows, world_size
from training.distributed.parallelize import unwrap
from training.distributed.sharding import begin_step, exchange_gradients, take_gradients
from training.losses import Loss
from training.losses.by_group import losses_by_group
from training.observability.compute_clock import ComputeClock
from training.optim.update import Update, running_statistics_kept
from training.precision import Precision
from training.resilience.guard import StepGuard


class StepMetrics(NamedTuple):
    """What one step measured: tensors on the device, 0-D and of this rank if nothing else is said.

    Reading them waits for the device.
    """

    loss: Tensor
    """This rank's share of the global loss: average it over ranks. For the batch before the update."""
    logit_scale: Tensor
    """Exponential of the parameter, as used in this step's loss."""
    grad_norm: Tensor | None
    """L2 norm of all gradients before clipping, equal on all ranks; not finite if the scaler skipped the step."""
    logit_bias: Tensor | None
    source_losses: Tensor | None = None
    """[S, 2]: sum of the rows' losses, and number of rows, by source of data. Each row against this rank's rows of the
    first micro-batch only: good to compare sources with each other, not with ``loss``."""
    vitals: Tensor | None = None
    """[len(VITALS)], equal on all ranks: what the guard knows about the step; None without a guard."""


class TrainStep:
    """Callable that updates a model. All ranks must call it with the same number of micro-batches."""

    def __init__(
        self,
        *,
        model: nn.Module,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        scaler: torch.amp.GradScaler | None = None,
        grad_clip_norm: float | None = None,
        num_sources: int = 1,
        guard: StepGuard | None = None,
        texts_first: bool | None = None,
    ) -> None:
        """
        Args:
            model: what ``parallelize`` returned.
            scaler: what ``precision.grad_scaler()`` returned; a disabled one stands in for None.
            grad_clip_norm: gradients are scaled down to this L2 norm if they exceed it.
            num_sources: of the data; with several the loss is also measured by source.
            guard: keeps bad steps from changing anything; None lets every step through.
            texts_first: whether texts are encoded before images, to be gathered meanwhile; None chooses.
        """
        self.model = model
        self.loss = loss
        self.optimizer = optimizer
        self.precision = precision
        self.scaler = scaler or torch.amp.GradScaler(precision.device_type, enabled=False)
        self.num_sources = num_sources
        self.compute_clock = ComputeClock(precision.device_type)
        """Started by whoever has waited for the batch; stopped here, where the ranks meet."""
        self._update = Update(
            unwrap(model), optimizer=optimizer, scaler=self.scaler, grad_clip_norm=grad_clip_norm, guard=guard
        )
        self._texts_first = texts_first
        self._needs_first_exchange = unwrap(model) is not model

    def __call__(self, micro_batches: Sequence[DeviceBatch], *, lr: float) -> StepMetrics:
        """Updates the weights once from all micro-batches together.

        Args:
            micro_batches: this rank's part of the global batch, in equal pieces.
            lr: learning rate of this step; a parameter group with an ``lr_scale`` gets that multiple of it.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        # None instead of zeros: the first backward pass then writes gradients instead of adding to them.
        self.optimizer.zero_grad(set_to_none=True)
        self._update.prepare()
        begin_step(unwrap(self.model))
        loss, outputs = self.compute_gradients(micro_batches)
        take_gradients(unwrap(self.model))  # collective with FSDP: all ranks
        result = self._update(loss=loss, features=_sum_of_features(outputs))
        first = outputs[0]
        return StepMetrics(
            loss,
            first.logit_scale.detach(),
            result.grad_norm,
            None if first.logit_bias is None else first.logit_bias.detach(),
            self._source_losses(first, micro_batches),
            result.vitals,
        )

    def compute_gradients(self, micro_batches: Sequence[DeviceBatch]) -> tuple[Tensor, list[ClipOutput]]:
        """(loss of this rank, what the model returned for each): the parameters' gradients are there, and unused."""
        texts_first = self._encodes_texts_first(micro_batches)
        self._exchange_once(micro_batches[0], texts_first=texts_first)
        if len(micro_batches) == 1:
            return self._backward(micro_batches[0], texts_first=texts_first)
        return self._backward_accumulated(micro_batches)

    def _source_losses(self, output: ClipOutput, micro_batches: Sequence[DeviceBatch]) -> Tensor | None:
        sources = micro_batches[0].sources
        if self.num_sources == 1 or sources is None:
            return None
        return losses_by_group(
            output.image_features, output.text_features, output.logit_scale, sources, num_groups=self.num_sources
        )

    def _encodes_texts_first(self, micro_batches: Sequence[DeviceBatch]) -> bool:
        if len(micro_batches) > 1:
            return False  # the loss sees all of them together, after both towers
        if self._texts_first is None:
            self._texts_first = texts_hide_more_than_they_expose(unwrap(self.model), rows=len(micro_batches[0].images))
        return self._texts_first

    def _backward(self, batch: DeviceBatch, *, texts_first: bool) -> tuple[Tensor, list[ClipOutput]]:
        """Gradients of one micro-batch. DDP sums them over ranks while the backward pass still runs."""
        texts: list[GatheredRows | None] = [None]
        begin = (lambda features: texts.append(self.loss.begin(features))) if texts_first else None
        output = self._forward(self.model, batch, begin)
        self.compute_clock.stop()
        # Outside of autocast: logits and loss in fp32. Taken out of the list, or all texts would outlive the loss.
        loss = self.loss(*output, texts.pop())
        self.scaler.scale(loss).backward()
        return loss.detach(), [output]

    def _backward_accumulated(self, micro_batches: Sequence[DeviceBatch]) -> tuple[Tensor, list[ClipOutput]]:
        """The same gradients from k micro-batches, with the activations of one of them in memory at a time."""
        # 1. Features of all micro-batches, and the random state each of them started with.
        outputs, random_states = self._encode_without_gradient(micro_batches)
        self.compute_clock.stop()

        # 2. One loss over everything. The features become leaves, so backward stops there instead of in the towers.
        joined = _join(outputs)
        loss = self.loss(*joined)
        self.scaler.scale(loss).backward()
        cut = _split_gradients(joined, sizes=[len(output.image_features) for output in outputs])

        # 3. Through the towers, piece by piece. Ranks exchange gradients once, in DDP's backward pass of the last one.
        # A backward pass of the plain model beside it adds to this rank's gradients only, and DDP averages the sum.
        # FSDP has no plain model: it is told to keep gradients until the last one.
        last = len(micro_batches) - 1
        for index, (batch, state, gradients) in enumerate(zip(micro_batches, random_states, cut, strict=True)):
            state.restore()  # the same dropout masks as in 1, or these would be other features than the loss saw
            exchange_gradients(self.model, index == last)
            model = self.model if index == last else unwrap(self.model)
            _backward_from(self._forward(model, batch), gradients)
        return loss.detach(), outputs

    def _exchange_once(self, batch: DeviceBatch, *, texts_first: bool) -> None:
        """In a process's first step: a backward pass of DDP that changes nothing.

        DDP sends its first gradients in one message, and those of later steps in buckets, in the order in which these
        came; so the towers are encoded in the order of the steps. Where several ranks add up, the order of a sum
        depends on its place in a message: without this pass the first step of a resumed run would differ from that of
        an uninterrupted one, in its last bits. With a static graph DDP also counts gradients until its first exchange,
        and would wait for those of micro-batches for ever after.
        """
        if not self._needs_first_exchange:
            return
        self._needs_first_exchange = False
        state = RandomState.capture(batch.images.device)
        with self.compute_clock.left_out(), running_statistics_kept(unwrap(self.model)):
            output = self._forward(self.model, batch, (lambda features: None) if texts_first else None)
            differentiable = [tensor for tensor in output if tensor is not None and tensor.requires_grad]
            torch.autograd.backward(differentiable, [torch.zeros_like(tensor) for tensor in differentiable])
        self.optimizer.zero_grad(set_to_none=True)
        state.restore()

    def _encode_without_gradient(
        self, micro_batches: Sequence[DeviceBatch]
    ) -> tuple[list[ClipOutput], list[RandomState]]:
        # The plain model: DDP prepares for a backward pass in each forward pass, and these have none.
        model = unwrap(self.model)
        outputs, random_states = [], []
        # Phase 3 sees the same batches again: running statistics of BatchNorm must count them once.
        with torch.no_grad(), running_statistics_kept(model):
            for batch in micro_batches:
                random_states.append(RandomState.capture(batch.images.device))
                outputs.append(self._forward(model, batch))
        return outputs, random_states

    def _forward(
        self, model: nn.Module, batch: DeviceBatch, on_text_features: Callable[[Tensor], None] | None = None
    ) -> ClipOutput:
        # One autocast region per forward pass. It remembers weights cast to half precision, and a cast made without
        # gradient, reused with gradient, would cut the weight off from the graph.
        plain = unwrap(model)
        meeting = nullcontext() if plain is model else self.compute_clock.paused_until_called(plain)
        with self.precision.autocast(), meeting:
            return cast(ClipOutput, model(batch.images, batch.texts, on_text_features))


def texts_hide_more_than_they_expose(model: nn.Module, *, rows: int) -> bool:
    """Whether to encode texts first, for batches of ``rows`` on every rank. The same on all ranks.

    First, they are gathered behind the image tower, and their gradients return behind it. But then the token
    embedding's gradient is the last of the step, and its exchange hides behind nothing. Both send each number twice:
    what counts is whether the texts of all ranks have more numbers than the table.
    """
    tables = [
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.weight.requires_grad
    ]
    return world_size() > 1 and world_size() * rows * cast(int, model.embed_dim) > max(tables, default=0)


class _Gradients(NamedTuple):
    """Gradients of the loss with respect to the fields of a ``ClipOutput``; None where there is none."""

    image_features: Tensor | None
    text_features: Tensor | None
    logit_scale: Tensor | None
    logit_bias: Tensor | None


class _Scalars(NamedTuple):
    logit_scale: Tensor | None
    logit_bias: Tensor | None


def _sum_of_features(outputs: Sequence[ClipOutput]) -> Tensor:
    """Over all micro-batches of this rank, 0-D: not finite if any feature is not."""
    features = [tensor for output in outputs for tensor in (output.image_features, output.text_features)]
    return torch.stack([tensor.detach().sum(dtype=torch.float32) for tensor in features]).sum()


def _join(outputs: Sequence[ClipOutput]) -> ClipOutput:
    """k outputs -> one over all rows, whose tensors are leaves: k x [B, E] -> [R, E]."""
    first = outputs[0]
    return ClipOutput(
        image_features=torch.cat([output.image_features for output in outputs]).requires_grad_(),
        text_features=torch.cat([output.text_features for output in outputs]).requires_grad_(),
        logit_scale=first.logit_scale.detach().clone().requires_grad_(),
        logit_bias=None if first.logit_bias is None else first.logit_bias.detach().clone().requires_grad_(),
    )


def _split_gradients(joined: ClipOutput, *, sizes: list[int]) -> list[_Gradients]:
    """Gradients for each micro-batch: its rows of the features', and with the last one the whole of the scalars'."""
    image_gradients = _gradient(joined.image_features).split(sizes)  # [R, E] -> k x [B, E]
    text_gradients = _gradient(joined.text_features).split(sizes)
    scalars = _Scalars(joined.logit_scale.grad, None if joined.logit_bias is None else joined.logit_bias.grad)
    # Zero rather than nothing: DDP expects the same parameters in every backward pass.
    zeros = _Scalars(*(None if gradient is None else torch.zeros_like(gradient) for gradient in scalars))
    pieces = [_Gradients(*rows, *zeros) for rows in zip(image_gradients, text_gradients, strict=True)]
    pieces[-1] = pieces[-1]._replace(**scalars._asdict())
    return pieces


def _gradient(features: Tensor) -> Tensor:
    assert features.grad is not None, "the loss does not depend on the features"
    return features.grad


def _backward_from(output: ClipOutput, gradients: _Gradients) -> None:
    """Backward from the outputs of the model, starting with the gradients that the loss gave them."""
    pairs = [
        (tensor, gradient)
        for tensor, gradient in zip(output, gradients, strict=True)
        if tensor is not None and gradient is not None and tensor.requires_grad  # a locked tower has nothing to learn
    ]
    torch.autograd.backward([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs])


class RandomState(NamedTuple):
    """State of the generators that a forward pass draws from, on the host and on its device."""

    cpu: Tensor
    cuda: Tensor | None
    device: torch.device

    @classmethod
    def capture(cls, device: torch.device) -> Self:
        """A CUDA generator's state is a seed and an offset kept on the host: reading it waits for nothing."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), cuda, device)

    def restore(self) -> None:
        """The generators continue from here."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)
