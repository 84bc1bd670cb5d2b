"""A GPU for machines without one: it computes on the CPU and is as strict as CUDA about devices.

Inside of `simulated_gpu()`, "cuda" is there for this process. Its tensors wrap CPU tensors, which
do the work; an operation that mixes both kinds is an error, as it is with CUDA. What the CPU would
have to wait for, copies to it and sizes that depend on the data, is kept in `waits`. The random
numbers are the CPU's own, so a run must give the numbers of a CPU. "nccl" is gloo, for tensors of
the GPU only. What it cannot do: autocast, compiling, the rounding of a real GPU.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
COPIES = ("_to_copy", "copy_")  # what may have tensors of both
FETCHES = ("_local_scalar_dense", "nonzero", "masked_select")


class GpuTensor(torch.Tensor):
    """PyTorch's core, which may have no CUDA, takes its device for "meta"; Python sees the GPU."""

    device = property(lambda self: GPU)
    is_cuda, is_meta = property(lambda self: True), property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl  # a copy on the CPU is a plain one
    inner: Tensor

    @staticmethod
    def __new__(cls: type, inner: Tensor) -> "GpuTensor":
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        self = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), **layout, dtype=inner.dtype, device="meta"
        )
        self.inner = inner
        return self

    def __reduce_ex__(self, protocol: int) -> tuple:
        return self.inner.__reduce_ex__(protocol)  # into a checkpoint

    def __repr__(self) -> str:
        return f"GpuTensor({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Callable, *_: object) -> None:
        raise RuntimeError(f"{func}: a tensor of the GPU outlived it")


class Names(TorchFunctionMode):
    """Turns "cuda" as an argument into "meta"."""

    def __torch_function__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        def rename(x: object) -> object:
            named = isinstance(x, str | torch.device) and str(x).startswith("cuda")
            return torch.device("meta") if named else x

        kwargs = kwargs or {}
        if func is not torch.device:
            args, kwargs = tree_map(rename, (args, kwargs))
        if func is torch.tensor and "device" in kwargs:  # which would hold no data
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func is torch.Tensor.tolist:  # which refuses subclasses
            return args[0].cpu().tolist()
        return func(*args, **kwargs)


class Operations(TorchDispatchMode):
    """Runs each operation on the inner tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.rng_states: list[Tensor] = []  # what random states were restored
        self.index: int | None = None  # of the GPU that this process chose

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        name, kwargs = func.overloadpacket.__name__, dict(kwargs or {})
        with self:  # in inference mode, operations arrive here that consist of others
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        wrappers = {id(x.inner): x for x in tensors if isinstance(x, GpuTensor)}
        # A single number of the CPU may be read along, not written.
        mutable = func._schema.is_mutable
        strangers = [x for x in tensors if not isinstance(x, GpuTensor) and (x.ndim or mutable)]
        if wrappers and strangers and name not in COPIES:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device")
        if func.namespace == "c10d" and name != "barrier" and (strangers or not wrappers):
            raise RuntimeError(f"{func}: no backend for tensors of the CPU")
        on_gpu = bool(wrappers)
        if name == "copy_":
            on_gpu = isinstance(args[0], GpuTensor)
        elif kwargs.get("device") is not None:
            on_gpu = kwargs["device"].type == "meta"
            kwargs["device"] = torch.device("cpu")
        masks = name.startswith("index") and any(x.dtype == torch.bool for x in tensors)
        if wrappers and (name in FETCHES or masks or (name in COPIES and not on_gpu)):
            self.waits.append(name)

        def unwrap(x: object) -> object:
            return x.inner if isinstance(x, GpuTensor) else x

        def wrap(x: object) -> object:
            if id(x) in wrappers:  # changed in place
                return wrappers[id(x)]
            return GpuTensor(x) if on_gpu and isinstance(x, Tensor) else x

        return tree_map(wrap, func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs)))


@contextlib.contextmanager
def simulated_gpu() -> Iterator[Operations]:
    gpu, init, barrier = Operations(), distributed.init_process_group, distributed.barrier

    def set_rng_state(state: Tensor, device: object = None) -> None:
        gpu.rng_states.append(state)
        torch.set_rng_state(state)

    def init_process_group(backend: str) -> None:
        assert backend == "nccl" and gpu.index is not None
        init("gloo")

    def silent_barrier(device_ids: list[int]) -> None:
        assert device_ids == [gpu.index]  # None would print a warning
        barrier()

    functions = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "_lazy_init": lambda: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": set_rng_state,
        "set_device": lambda index: setattr(gpu, "index", index),
        "current_device": lambda: gpu.index,
    }
    collectives = {"init_process_group": init_process_group, "barrier": silent_barrier}
    with (
        mock.patch.multiple("torch.cuda", **functions),
        mock.patch.multiple("torch.distributed", **collectives),
        # Adam asks whether its step is being recorded; torch with CUDA would ask the driver
        mock.patch.object(
            torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda adam: None
        ),
        Names(),
        gpu,
    ):
        yield gpu
