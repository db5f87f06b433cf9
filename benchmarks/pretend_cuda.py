"""Train on a device that is not there: python benchmarks/pretend_cuda.py [flags of grpo.py]

On any machine this shows what a GPU would refuse: a forgotten .to(device), an index, a random
generator or a gradient on the wrong side, the .numpy() of a device's tensor. Tensors that were made
on "cuda" or sent there hold CPU numbers, say that they are on cuda:0, and raise where they meet one
that is not. The flag --device cuda is set by it.

What it cannot show: kernels and their numerics, streams, memory, speed. Nor does it see what
happens within one function of torch (its backward pass, say), or between processes.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._functorch import vmap
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
CpuGenerator = torch.Generator
SET_DATA = vars(torch._C.TensorBase)["data"].__set__  # x.data = y


class Pretended(Tensor):
    """A tensor on the device. Only its class sets it apart from a CPU tensor, and that can be
    changed in place, so views, autograd, parameters and tied weights are torch's own."""

    # Calls that involve such a tensor go to Pretence alone.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    device, is_cuda, is_cpu = CUDA, True, False

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy: .cpu() comes first")
        return self.cpu().numpy()

    def __iter__(self):  # of torch.Tensor's, Pretence would see an iterator and no tensors
        return iter(self.unbind(0))

    def __repr__(self, *, tensor_contents=None):  # torch.Tensor's asks the driver
        return f"on cuda:0: {self.tolist()}"


class Generator(CpuGenerator):
    """A generator of the CPU that says where it was wanted. A GPU's own draws other numbers."""

    device: Any = CPU

    def __new__(cls, device: Any = CPU) -> "Generator":
        made = super().__new__(cls)
        made.device = torch.device(device)
        return made


def place(x: Tensor, there: bool) -> Tensor:
    """Put a tensor on the device or the CPU, in place."""
    if there != isinstance(x, Pretended):
        x._is_param = isinstance(x, torch.nn.Parameter)  # a parameter remains one
        x.__class__ = Pretended if there else Tensor
    return x


def to(x: Tensor, *args: Any, copy: bool = False, **options: Any) -> Tensor:
    """Tensor.to: from one side to the other it always copies."""
    if args and isinstance(args[0], Tensor):
        args = args[0].device, args[0].dtype, *args[1:]
    device, dtype, _, layout = torch._C._nn._parse_to(*args, **options)
    device = device or x.device
    there = device.type == "cuda"
    copy = copy or there != isinstance(x, Pretended)
    layout = layout or torch.preserve_format
    moved = x.to(CPU if there else device, dtype or x.dtype, copy=copy, memory_format=layout)
    return place(moved, there)


def alike(function: Callable) -> Callable:
    """The function, with its result on the side of its first argument."""
    return lambda x, *rest: place(function(x, *rest), isinstance(x, Pretended))


class Pretence(TorchFunctionMode):
    """A context in which the device exists. It intercepts every call into torch, including methods
    and attributes, together with the arguments."""

    def __enter__(self) -> "Pretence":
        self.changed = ExitStack()
        changes: dict[str, Any] = {"torch.Generator": Generator}
        # It does not see tensors enter and leave vmap, in which transformers 4 makes masks.
        for name in ("_add_batch_dim", "_remove_batch_dim"):
            changes[f"{vmap.__name__}.{name}"] = alike(getattr(vmap, name))
        for name, new in changes.items():
            self.changed.enter_context(mock.patch(name, new))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.changed.close()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.__name__, dict(kwargs or {})
        if name == "to":
            return to(*args, **kwargs)
        if name in ("cpu", "cuda"):
            return to(args[0], name, **kwargs)
        if func == SET_DATA:  # as a module's parameters move
            func(*args)
            return place(args[0], isinstance(args[1], Pretended))
        if name in ("copy_", "_has_compatible_shallow_copy_type"):  # where the sides may meet
            return func(*args, **kwargs)

        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        there = any(isinstance(x, Pretended) for x in tensors)
        strangers = [x for x in tensors if there and not isinstance(x, Pretended)]
        # A GPU takes numbers from the CPU that are arguments of their own, and indices.
        guests = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() == 0]
        if name in ("__getitem__", "__setitem__") and isinstance(args[0], Pretended):
            guests += tree_leaves(args[1])
        if kwargs.get("device") is not None:  # and whatever a new tensor is made of
            there = torch.device(kwargs["device"]).type == "cuda"
            kwargs["device"] = CPU if there else kwargs["device"]
            guests += strangers
        strangers = [x for x in strangers if not any(x is guest for guest in guests)]
        generators = [x for x in leaves if isinstance(x, CpuGenerator)]
        generators = [x for x in generators if there != (x.device.type == "cuda")]
        if strangers or generators:
            raise RuntimeError(f"{name}: expected all on one device, found cuda:0 and cpu")
        kwargs.pop("pin_memory", None)  # memory that only a driver can lock
        results = func(*args, **kwargs)
        for x in tree_leaves(results) if there else []:
            if isinstance(x, Tensor):
                if any(x is guest for guest in guests) and not isinstance(x, Pretended):
                    raise RuntimeError(f"{name}: a tensor of the CPU cannot become one of cuda:0")
                place(x, there)
        return results


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import grpo

    with Pretence():
        sys.exit(grpo.main(["--device", "cuda", *sys.argv[1:]]))
