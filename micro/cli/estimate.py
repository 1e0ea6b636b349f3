"""``micro estimate``: parameters, memory, operations and time before anything is downloaded or trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from micro.estimate import Estimate


def estimate(
    source: Annotated[str, typer.Argument(help="Model folder, config.json, or a backbone's name (SmolLM2-135M, ...).")],
    kind: Annotated[str | None, typer.Option(help="Of a dense backbone, estimate block, ffn or dense.")] = None,
    experts: Annotated[int, typer.Option(help="Experts per layer, for dense backbones.")] = 4,
    experts_per_token: Annotated[int | None, typer.Option(help="Experts per token in inference.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, of weights, cache and activations.")] = "float32",
    length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 2048,
    batch: Annotated[int, typer.Option(help="Sequences in memory at once.")] = 1,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Keep layer inputs only.")] = False,
    freeze: Annotated[str, typer.Option(help="What stage 1 trains: r1 (experts) or r2 (all but routers).")] = "r2",
    gflops: Annotated[
        float | None, typer.Option(help="Speed for the times; default: a matrix product, measured here.")
    ] = None,
    tokens: Annotated[float | None, typer.Option(help="Training tokens per stage, for the hours it takes.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Estimate a model, or what upcycling a dense backbone would give."""
    from micro import estimate as costs

    if gflops is not None and not gflops > 0:
        raise ValueError(f"--gflops {gflops} must be positive")
    result = costs.estimate(
        source,
        kind=kind,  # type: ignore[arg-type]
        num_experts=experts,
        experts_per_token=experts_per_token,
        precision=dtype,
        length=length,
        batch=batch,
        checkpointing=checkpointing,
        freeze=freeze,
        flops_per_second=gflops * 1e9 if gflops is not None else costs.measure_flops_per_second(dtype),
    )
    if json:
        import json as format_json

        typer.echo(format_json.dumps(result.to_dict(), indent=2))
    else:
        typer.echo(as_text(result, tokens, measured=gflops is None))


def as_text(result: Estimate, tokens: float | None, *, measured: bool) -> str:
    """The estimate for people; times are bounds, because real code does not reach the speed of a matrix product."""
    shape, counts = result.shape, result.parameters
    experts = "dense" if shape.kind == "dense" else f"{shape.E} experts ({shape.kind}), {shape.K} per token"
    lines = [
        f"{shape.family}, {shape.L} layers, {experts}",
        f"parameters   {counts.total:,} in all; {counts.active:,} active per token; routers {counts.routers:,}; "
        f"{counts.tensors:,} tensors",
        f"inference    weights {_bytes(result.weight_bytes)} ({result.precision}); cache "
        f"{_bytes(result.cache_bytes)} at {result.batch} x {result.length} tokens",
        f"prefill      {result.prefill_flops_per_token / 1e6:,.0f} MFLOP per token; "
        f"at most {_rate(result.prefill_tokens_per_second)}",
        "",
        f"{'training':<12} {'K':>2} {'trained':>14} {'memory':>9} {'weights':>9} {'optimizer':>9} {'activ.':>9} "
        f"{'MFLOP/token':>12}  speed at most",
    ]
    for stage in result.stages:
        memory = stage.memory
        time = ""
        if tokens is not None and stage.tokens_per_second:
            time = f", {tokens / stage.tokens_per_second / 3600:.2f} h for {tokens:g} tokens"
        lines.append(
            f"{stage.name:<12} {stage.experts_per_token:>2} {stage.trained_parameters:>14,} "
            f"{_bytes(memory['total']):>9} {_bytes(memory['weights']):>9} {_bytes(memory['optimizer']):>9} "
            f"{_bytes(memory['activations']):>9} "
            f"{stage.flops_per_token / 1e6:>12,.0f}  {_rate(stage.tokens_per_second)}{time}"
        )
    speed = "that of a matrix product measured on this machine" if measured else "the one given"
    lines += [
        "",
        f"Estimates. Activations: {result.batch} x {result.length} tokens. The speed is {speed}; real runs reach less.",
    ]
    return "\n".join(lines)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} GB" if count < 1000 else f"{count:,.0f} GB"


def _rate(tokens_per_second: float | None) -> str:
    return "unknown" if tokens_per_second is None else f"{tokens_per_second:,.0f} tokens/s"
