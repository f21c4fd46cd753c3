"""Files and folders that settings name, made independent of the folder a process works in."""

from __future__ import annotations

import dataclasses

from lalora_flwr.ground.files import expanded
from lalora_flwr.settings import Settings


def with_absolute_paths(settings: Settings) -> Settings:
    """The settings with absolute ``output-dir``, ``metrics-file``, data, folders of models and adapters; hub names stay."""
    family, _, name = settings.model.name.partition("/")
    if (folder := expanded(name)).is_dir():
        name = str(folder.absolute())
    return dataclasses.replace(
        settings,
        lora=dataclasses.replace(settings.lora, start_from=_folder(settings.lora.start_from)),
        output_dir=str(expanded(settings.output_dir).absolute()),
        metrics_file=settings.metrics_file and str(expanded(settings.metrics_file).absolute()),
        model=dataclasses.replace(settings.model, name=f"{family}/{name}"),
        data=dataclasses.replace(settings.data, name=_files(settings.data.name), test=_files(settings.data.test)),
    )


def _folder(value: str) -> str:
    return str(expanded(value).absolute()) if value else ""


def _files(value: str) -> str:
    kind, _, path = value.partition(":")
    return f"file:{expanded(path).absolute()}" if kind == "file" else value
