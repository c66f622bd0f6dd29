"""Linear layers for passes of a few rows.

At the rows of one step a linear layer costs what reading its weights costs, so they are laid out
once for the kernel, and half as wide where that loses next to nothing. Projections that read the
same input (q, k, v; gate, up) become one product.

| device, dtype | weights            | product                                             |
|---------------|--------------------|-----------------------------------------------------|
| CPU bfloat16  | bfloat16, packed   | oneDNN, if the CPU has AVX-512                      |
| CPU float16   | float16, packed    | FBGEMM, in float32 (the rest of the model as well)  |
| CPU float32   | float32, + packed  | MKL packed up to PACKED_ROWS rows, above it plain   |
| else          | as they are        | plain                                               |

RMS norms are written in fewer operations.

Legend: M rows, I inputs, O outputs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from value_server.model.value_model import default_dtype

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
PACKED_ROWS = 24  # float32 only: with more rows the plain kernel is as fast or faster

Product = Callable[[Tensor], Tensor]


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Of activations, keys and values, for weights of `dtype`: no CPU multiplies float16."""
    return torch.float32 if dtype == torch.float16 and device.type == "cpu" else dtype


def weight_dtype(name: str, device: torch.device) -> torch.dtype:
    """By name; "auto" is the type that the device is fastest with."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    dtype = default_dtype(device)
    has_fbgemm = "fbgemm" in torch.backends.quantized.supported_engines
    half = device.type == "cpu" and dtype == torch.float32 and has_fbgemm
    return torch.float16 if half else dtype


def pack_inplace(backbone: nn.Module, dtype: torch.dtype) -> None:
    """Replace every linear layer and norm of `backbone`, on its device and in its compute_dtype.

    dtype: of the weights. Afterwards the backbone can only infer, and cannot be saved.
    """
    for parent in list(backbone.modules()):
        for names in SIBLINGS:
            linears = [
                child for name in names if type(child := getattr(parent, name, None)) is nn.Linear
            ]
            if len(linears) == len(names):
                fused = _Fused(linears, dtype)
                for index, name in enumerate(names):
                    setattr(parent, name, _Packed(partial(fused.part, index)))
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, _Packed(_product(child.weight, child.bias, dtype)))
            elif _is_plain_rms_norm(child):
                setattr(parent, name, _Norm(child))


def compile_inplace(backbone: nn.Module) -> None:
    """Instead of packing: MLPs and norms through torch.compile, which runs with their first pass.

    Attention stays out of it: the slots that it reads are other ones in each pass.
    """
    for module in backbone.modules():
        if type(module).__name__.endswith(("MLP", "Norm")):
            module.compile(dynamic=True)


def _is_plain_rms_norm(module: nn.Module) -> bool:
    """That of Llama and its kin: weight * x / rms(x). Others (Gemma: 1 + weight) stay."""
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")


class _Norm(nn.Module):
    """weight * x / sqrt(mean(x²) + eps), as weight * sqrt(I) * x / hypot(|x|, sqrt(I * eps))."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        weight = norm.weight.detach()
        size = weight.shape[0]
        self._scale = weight * size**0.5
        self._floor = weight.new_tensor(size * norm.variance_epsilon, dtype=torch.float32).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return x.div(torch.hypot(norm, self._floor)).to(x.dtype).mul_(self._scale)


class _Packed(nn.Module):
    def __init__(self, product: Product) -> None:
        super().__init__()
        self._product = product

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) → (..., O)."""
        return self._product(x)


class _Fused:
    """Several linear layers of one input as one; computed when the first of them is asked."""

    def __init__(self, linears: list[nn.Linear], dtype: torch.dtype) -> None:
        self._sizes = [linear.out_features for linear in linears]
        weight = torch.cat([linear.weight for linear in linears])
        bias = None
        if any(linear.bias is not None for linear in linears):
            zeros = weight.new_zeros(max(self._sizes))
            bias = torch.cat(
                [zeros[: m.out_features] if m.bias is None else m.bias for m in linears]
            )
        self._product = _product(weight, bias, dtype)
        self._input: Tensor | None = None
        self._parts: tuple[Tensor, ...] = ()

    def part(self, index: int, x: Tensor) -> Tensor:
        """(..., I) → (..., O of layer `index`), a view."""
        if x is not self._input:
            self._input, self._parts = x, self._product(x).split(self._sizes, dim=-1)
        part = self._parts[index]
        if index == len(self._sizes) - 1:
            self._input, self._parts = None, ()
        return part


def _product(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Product:
    """x → x W' + b by the fastest kernel for weight (O, I) and its device."""
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    on_cpu = weight.device.type == "cpu"
    if on_cpu and dtype == torch.bfloat16 and _packs_bfloat16():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 16)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    if on_cpu and dtype == torch.float16:
        half = torch.ops.quantized.linear_prepack_fp16(weight.float(), bias)
        return lambda x: torch.ops.quantized.linear_dynamic_fp16(x, half)
    if on_cpu and dtype == torch.float32 and torch.backends.mkl.is_available():
        return _mkl(weight, bias)
    return lambda x: nn.functional.linear(x, weight, bias)


def _packs_bfloat16() -> bool:
    """Not where the CPU has no AVX-512, for one."""
    mkldnn = torch.backends.mkldnn.is_available()
    return mkldnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _mkl(weight: Tensor, bias: Tensor | None) -> Product:
    weight = weight.contiguous()
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, PACKED_ROWS)

    def product(x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if rows > PACKED_ROWS:
            return nn.functional.linear(x, weight, bias)
        flat: Tensor = torch.ops.mkl._mkl_linear(x, packed, weight, bias, rows)
        return flat

    return product
