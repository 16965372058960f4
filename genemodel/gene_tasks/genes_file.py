"""``genemodel genes``: a table of what a model says of genes, in cells or by itself."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd

from genemodel.bundle.bundle import Bundle
from genemodel.bundle.given import model_for
from genemodel.cells.input_settings import InputSettings
from genemodel.errors import ConfigError, DataError
from genemodel.gene_tasks.labels import classify_genes
from genemodel.gene_tasks.vectors import table_of
from genemodel.model.devices import device_of
from genemodel.settings import ModelText, PathText
from genemodel.writing import whole


@dataclass(frozen=True, kw_only=True)
class GenesSettings(InputSettings):
    """Settings of ``genemodel genes``, see ``configs/genes.yaml``."""

    model: ModelText
    output: PathText
    input: PathText = ""
    kind: Literal["static", "contextual", "labels"] = "static"
    genes: tuple[str, ...] = ()
    label_key: str = ""
    spread: bool = False
    min_cells: int | None = None
    blocks: int | None = None
    context: int = 0
    batch_size: int | None = None
    device: str = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind != "static" and not self.input:
            raise ConfigError(f"kind={self.kind} needs cells: give input=FILE.")
        if self.kind == "labels":
            for name, default in (
                ("label_key", ""), ("spread", False), ("blocks", None), ("context", 0)
            ):  # fmt: skip
                if getattr(self, name) != default:
                    raise ConfigError(
                        f"{name}={getattr(self, name)} says nothing to kind=labels: leave it out."
                    )


def genes_file(settings: GenesSettings) -> Path:
    """Write the table; see :mod:`~genemodel.gene_tasks.vectors` and :func:`classify_genes`."""
    output = _writable(settings)
    if settings.input and not Path(settings.input).exists():
        raise DataError(f"input={settings.input} does not exist.")
    genes = list(settings.genes) or None
    if settings.kind == "labels":
        table = classify_genes(
            settings.input, settings.model, genes=genes, min_cells=settings.min_cells,
            batch_size=settings.batch_size, device=settings.device, **settings.options(),
        )  # fmt: skip
    else:
        bundle = model_for(
            "give vectors of genes", (Bundle,), settings.model, device=device_of(settings.device)
        )
        table = table_of(
            settings.input or None, bundle, settings.reading, kind=settings.kind, genes=genes,
            label_key=settings.label_key or None, spread=settings.spread,
            min_cells=1 if settings.min_cells is None else settings.min_cells,
            blocks=settings.blocks, context=settings.context, batch_size=settings.batch_size,
        ).table  # fmt: skip
    _write(table, output)
    return output


def _writable(settings: GenesSettings) -> Path:
    output = Path(settings.output)
    if not output.name.endswith((".tsv", ".tsv.gz", ".csv", ".csv.gz", ".parquet")):
        raise ConfigError(
            f"output={output}: the ending says the format; it must be .tsv, .tsv.gz, .csv, .csv.gz "
            "or .parquet."
        )
    if output.is_dir():
        raise ConfigError(f"output={output} is a folder: name a file.")
    if output.exists() and not settings.overwrite:
        raise ConfigError(f"output={output} exists: set overwrite=true, or another name.")
    folder = output.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"output={output}: {folder} is no folder that can be written to.")
    if output.suffix == ".parquet":
        import importlib.util

        if importlib.util.find_spec("pyarrow") is None:
            raise ConfigError(
                f"output={output} needs pyarrow, which is not installed: pip install pyarrow, or "
                "write .tsv.gz."
            )
    return output


def _write(table: pd.DataFrame, output: Path) -> None:
    with whole(output) as partial:
        if output.suffix == ".parquet":
            table.to_parquet(partial)
            return
        table.to_csv(
            partial, sep="\t" if ".tsv" in output.suffixes else ",",
            compression="gzip" if output.suffix == ".gz" else None,
        )  # fmt: skip
