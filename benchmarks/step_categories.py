"""Sorts the operations of a profiled train step into a few categories; every operation lands in exactly one.

    a scope around it (loss, optimizer, attention, collective)   decides for everything inside, whatever it is called
    the operation's own name                                     a table
    a step of the backward pass, which only calls others         as the operation of the forward pass it belongs to
    a kernel's name                                              where a compiler made both

The backward pass runs outside of the scopes of the forward pass. The profiler numbers operations that autograd records,
and gives their backward steps the same number: that is how a gradient of the loss is known to be one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch._C._autograd import DeviceType

STEP_MARK, LOSS_MARK = "clipyard::step", "clipyard::loss"
CATEGORIES = (
    *("matrix products", "attention", "convolution", "norm, pointwise", "copies, layout", "optimizer", "loss"),
    *("collectives", "other"),
)

SCOPES: tuple[tuple[str, str], ...] = (
    (LOSS_MARK, "loss"),
    ("Optimizer.", "optimizer"),
    ("aten::_foreach_", "optimizer"),  # the gradient norm, and clipping
    ("aten::_fused_adam", "optimizer"),
    ("aten::_amp_", "optimizer"),
    ("clipyard::grouped_", "attention"),
    ("GeneratedBackwardFor_clipyard_grouped_", "attention"),
    ("clipyard::attend", "attention"),
    ("aten::scaled_dot_product_attention", "attention"),
    ("aten::_scaled_dot_product_", "attention"),
    ("aten::_flash_attention", "attention"),
    ("aten::_efficient_attention", "attention"),
    ("aten::_cudnn_attention", "attention"),
    ("aten::_varlen", "attention"),
    ("torch_attn::", "attention"),
    ("flash_attn", "attention"),
    ("c10d::", "collectives"),
    ("nccl:", "collectives"),
    ("gloo:", "collectives"),
    ("record_param_comms", "collectives"),
)
"""(Beginning of a name, category) of what decides for all that runs inside of it. The outermost wins."""

_NAMES = {
    "matrix products": """mm addmm bmm baddbmm addbmm matmul linear mv addmv dot vdot ger outer einsum _scaled_mm
        _addmm_activation linalg_matmul linear_backward chain_matmul inner tensordot""",
    "convolution": """conv1d conv2d conv3d convolution _convolution convolution_backward convolution_overrideable
        mkldnn_convolution cudnn_convolution cudnn_convolution_relu thnn_conv2d _slow_conv2d_forward
        _slow_conv2d_backward _conv_depthwise2d _convolution_mode im2col col2im conv_depthwise3d
        max_pool2d max_pool2d_with_indices max_pool2d_with_indices_backward avg_pool2d avg_pool2d_backward
        adaptive_avg_pool2d _adaptive_avg_pool2d _adaptive_avg_pool2d_backward""",
    "norm, pointwise": """layer_norm native_layer_norm native_layer_norm_backward group_norm native_group_norm
        native_group_norm_backward batch_norm _batch_norm_impl_index native_batch_norm native_batch_norm_backward
        cudnn_batch_norm cudnn_batch_norm_backward _batch_norm_with_update batch_norm_backward _fused_rms_norm
        add add_ sub sub_ rsub mul mul_ div div_ true_divide neg neg_ abs abs_ sign exp exp_ expm1 log log_ log1p sqrt
        sqrt_ rsqrt rsqrt_ pow pow_ square reciprocal reciprocal_ sigmoid sigmoid_ sigmoid_backward silu silu_
        silu_backward gelu gelu_backward relu relu_ threshold_backward tanh tanh_ tanh_backward dropout native_dropout
        native_dropout_backward bernoulli_ clamp clamp_ clamp_min clamp_min_ clamp_max clamp_max_ clamp_backward
        sum mean var std max min amax amin maximum minimum norm linalg_vector_norm cumsum logsumexp logaddexp softmax
        _softmax _softmax_backward_data log_softmax _log_softmax _log_softmax_backward_data isfinite isnan isinf
        logical_and logical_or logical_not logical_xor bitwise_and bitwise_not bitwise_and_ bitwise_or __and__ __or__
        all any eq ne lt le gt ge equal where masked_fill masked_fill_ argmax argmin lerp lerp_ addcmul addcmul_ addcdiv
        addcdiv_ lgamma erf special_expm1 floor_divide remainder fmod prod normalize nan_to_num count_nonzero
        rand randn uniform_ normal_ random_ randperm topk sort argsort round floor ceil""",
    "copies, layout": """copy_ _to_copy to clone contiguous reshape view _unsafe_view _reshape_alias view_as transpose
        transpose_ t numpy_T permute movedim expand expand_as unsqueeze unsqueeze_ squeeze squeeze_ slice slice_backward
        select select_backward narrow unbind split split_with_sizes chunk tensor_split cat stack hstack vstack flatten
        unflatten unfold as_strided as_strided_ diagonal diagonal_backward tril triu triu_ tril_ index index_put_
        _index_put_impl_ index_put index_select index_select_backward index_copy_ index_copy index_add_ index_add
        gather gather_backward scatter scatter_ scatter_add scatter_add_ masked_select nonzero nonzero_numpy
        embedding embedding_dense_backward embedding_backward embedding_renorm_ empty empty_like empty_strided new_empty
        new_empty_strided new_zeros new_ones new_full zeros zeros_like zero_ ones ones_like full full_like fill_
        arange eye linspace scalar_tensor tensor resize_ resize_as_ set_ set_data detach detach_ alias alias_ lift_fresh
        lift_fresh_copy item _local_scalar_dense is_pinned pin_memory _pin_memory repeat repeat_interleave flip roll
        pad constant_pad_nd broadcast_tensors broadcast_to result_type promote_types can_cast type_as is_nonzero mT mH
        swapaxes atleast_1d atleast_2d real lift resolve_conj resolve_neg
        _autocast_to_reduced_precision _autocast_to_full_precision""",
}
NAMES: dict[str, str] = {
    f"aten::{name}": category for category, names in _NAMES.items() for name in dict.fromkeys(names.split())
} | {
    "detach": "copies, layout",
    "torch::autograd::AccumulateGrad": "copies, layout",
    "torch::autograd::CopyBackwards": "copies, layout",
    "torch::autograd::CopySlices": "copies, layout",
    "torch::autograd::GraphRoot": "copies, layout",
    "mkldnn::_linear_pointwise": "matrix products",
    "mkl::_mkl_linear": "matrix products",
    "mkldnn::_convolution_pointwise": "convolution",
}
"""Category of each operation by its own name."""

MARKS = (STEP_MARK, "ProfilerStep")
"""Whose own time is Python's, between operations."""

_BACKWARD_STEP = "autograd::engine::evaluate_function: "
_COMPILED = ("triton_", "cpp_fused_", "Torch-Compiled Region", "## Call CompiledFxGraph", "CompiledFunction")
"""What torch.compile puts in place of operations; matrix products that it leaves to libraries keep their names."""
_KERNELS = (
    *(("triton_tem", "matrix products"), ("triton_mm", "matrix products"), ("triton_", "norm, pointwise")),
    *(("nccl", "collectives"), ("flash", "attention"), ("fmha", "attention"), ("Memcpy", "copies, layout")),
    *(("Memset", "copies, layout"), ("gemm", "matrix products"), ("cutlass", "matrix products")),
    *(("nvjet", "matrix products"), ("fprop", "convolution"), ("dgrad", "convolution"), ("wgrad", "convolution")),
    *(("elementwise", "norm, pointwise"), ("reduce_kernel", "norm, pointwise")),
)
"""(Part of a name, category), for kernels of operations that no table knows."""


class Operation(NamedTuple):
    """Something the profiler saw, with what is needed to know where it belongs."""

    name: str
    around: tuple[str, ...]
    """Names of what it ran inside of, outermost first."""
    forward: tuple[str, ...] = ()
    """In the backward pass: what ran in the forward pass under the same number, outermost first."""
    time_us: float = 0.0
    """On CUDA of its kernels, on a CPU of itself without what it calls."""
    kernels: int = 1
    kernel_names: tuple[str, ...] = ()


def categorize(operation: Operation) -> str:
    """The one category of an operation."""
    name = operation.name.removeprefix(_BACKWARD_STEP)
    scope = _scope((*operation.around, name)) or _scope(operation.forward)
    if scope is not None:
        return scope
    if name in NAMES:
        return NAMES[name]
    for outer in reversed(operation.forward):
        if outer in NAMES:
            return NAMES[outer]
    for kernel in operation.kernel_names:
        for part, category in _KERNELS:
            if part in kernel:
                return category
    if name.startswith(_COMPILED) or (operation.forward and operation.forward[-1].startswith(_COMPILED)):
        return "norm, pointwise"
    return "other"


def _scope(names: Iterable[str]) -> str | None:
    for name in names:
        for beginning, category in SCOPES:
            if name.removeprefix(_BACKWARD_STEP).startswith(beginning):
                return category
    return None


def read_operations(events: Iterable[Any], *, on_device: bool) -> Iterator[Operation]:
    """The operations among a profiler's events.

    Args:
        on_device: count kernels and their time instead of operations and theirs.
    """
    events = [event for event in events if event.device_type == DeviceType.CPU]
    recorded = _forward_by_number(events)
    for event in events:
        if event.name.startswith(MARKS):
            continue
        around = _around(event)
        kernels = [kernel for kernel in event.kernels if kernel.name != event.name or event.name.startswith("triton_")]
        if on_device and not kernels:
            continue
        yield Operation(
            name=event.name,
            around=around,
            forward=recorded.get(_number_of_backward(event), ()),
            time_us=sum(kernel.duration for kernel in kernels) if on_device else event.self_cpu_time_total,
            kernels=len(kernels) if on_device else 1,
            kernel_names=tuple(kernel.name for kernel in kernels),
        )


def _around(event: Any) -> tuple[str, ...]:
    names: list[str] = []
    parent = event.cpu_parent
    while parent is not None:
        names.append(parent.name)
        parent = parent.cpu_parent
    return tuple(reversed(names))


def _forward_by_number(events: Iterable[Any]) -> dict[tuple[int, int], tuple[str, ...]]:
    """(thread, number) -> names of the innermost operation that autograd recorded under it, and around it."""
    found: dict[tuple[int, int], tuple[str, ...]] = {}
    for event in events:
        if event.sequence_nr >= 0 and _backward_root(event) is None:
            found[event.thread, event.sequence_nr] = (*_around(event), event.name)
    return found


def _number_of_backward(event: Any) -> tuple[int, int]:
    root = _backward_root(event)
    return (-1, -1) if root is None else (root.fwd_thread, root.sequence_nr)


def _backward_root(event: Any) -> Any:
    """The step of the backward pass that an event belongs to; None in the forward pass."""
    while event is not None:
        if event.name.startswith(_BACKWARD_STEP):
            return event
        event = event.cpu_parent
    return None
