"""Expert linear map against torch's linear: the same rows per expert, and weights too many for the caches.

Every expert of every layer gets the given rows, layer after layer, as a model does; the other side calls F.linear once
per expert on the same slices. One process, interleaved pairs.

    python benchmarks/python/bench_expert_linear.py --shape 576x576 1536x576 --rows 1 2 4 8 16 --dtype bfloat16
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from paired import compare, print_header, write
from torch import Tensor

from micro import ops

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the largest value; tests/python/tolerances.py


class Layers:
    """Weights of several layers of E experts, `rows` rows for each expert."""

    def __init__(self, out: int, width: int, rows: int, experts: int, dtype: torch.dtype, megabytes: int) -> None:
        layer_bytes = experts * out * width * dtype.itemsize
        count = max(1, megabytes * 2**20 // layer_bytes)
        self.weights = [torch.randn(experts, out, width, dtype=dtype) / width**0.5 for _ in range(count)]
        self.x = torch.randn(experts * rows, width, dtype=dtype)
        self.rows, self.bytes, self.flops = rows, count * layer_bytes, 2.0 * count * experts * rows * out * width
        self.offsets = (torch.arange(experts + 1) * rows).int()

    def ours(self) -> list[Tensor]:
        return [ops.expert_linear(self.x, weight, self.offsets) for weight in self.weights]

    def torch(self) -> list[Tensor]:
        return [
            torch.cat([F.linear(x, w) for x, w in zip(self.x.split(self.rows), weight, strict=True)])
            for weight in self.weights
        ]

    def check(self) -> None:
        for got, want in zip(self.ours(), self.torch(), strict=True):
            error = ((got - want).abs().max() / want.abs().max()).item()
            if not error <= TOLERANCE[got.dtype]:
                raise SystemExit(f"wrong result: relative error {error:.2e}; nothing was timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["576x576", "1536x576", "576x1536"], help="out x in")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 128], help="per expert")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--megabytes", type=int, default=256, help="of weights per pass; above the last cache's size")
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    print_header()
    ratios = []
    for name in arguments.dtype:
        for shape in arguments.shape:
            out, width = map(int, shape.split("x"))
            for rows in arguments.rows:
                layers = Layers(out, width, rows, arguments.experts, getattr(torch, name), arguments.megabytes)
                with torch.no_grad():
                    layers.check()
                    ratio = compare(f"{name} {shape} {rows:4d} rows", layers.ours, layers.torch, pairs=arguments.pairs)
                ratios.append(ratio)
                speed = (
                    f"{layers.bytes / ratio.ours_ms / 1e6:6.1f} GB/s {layers.flops / ratio.ours_ms / 1e6:6.0f} GFLOP/s"
                )
                print(f"{ratio}   {speed}", flush=True)
    write("expert_linear", ratios, arguments.output)


if __name__ == "__main__":
    main()
