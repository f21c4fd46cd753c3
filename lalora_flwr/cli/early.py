"""What can be refused within a second: all that needs neither torch nor data nor the hub."""

from __future__ import annotations

import glob
import os
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlparse

from lalora_flwr.adapter.saved import weights_of
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.extras import need_four_bits
from lalora_flwr.ground.files import expanded
from lalora_flwr.ground.logs import wants_json
from lalora_flwr.ground.processors import check_threads
from lalora_flwr.server.place import folder_for
from lalora_flwr.server.tracking import check_trackers
from lalora_flwr.settings import Settings

GPU_DEVICES = ("/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/nvmap", "/dev/dxg", "/dev/kfd")  # NVIDIA's, Jetson's, WSL's, AMD's
HUB, HUB_SECONDS = "https://huggingface.co", 3.0


def check_machine(
    settings: Settings, gpu_devices: tuple[str, ...] = GPU_DEVICES, find: Callable[[str], object] = find_spec
) -> None:
    """Refuse what this machine has not.

    Raises:
        ConfigError: more threads than processors, a GPU where there is none, or four bits without their library.
    """
    if not os.environ.get("RAY_ADDRESS"):  # on a cluster other machines compute
        check_threads(settings.train.num_threads)
    wanted = "train.device = 'cuda'" if settings.train.device == "cuda" else ""
    wanted = wanted or (f"train.num-gpus = {settings.train.num_gpus:g}" if settings.train.num_gpus else "")
    if wanted and sys.platform == "linux" and not any(Path(device).exists() for device in gpu_devices):
        raise ConfigError(f"{wanted}: this machine has no GPU")
    if settings.model.dtype == "nf4" or "precision=nf4" in settings.profiles:
        need_four_bits(find)


def check_early(settings: Settings) -> None:
    """All of it, for a run on this machine.

    Raises:
        ConfigError: as `check_log`, `check_machine`, `check_output`, `check_places` and `check_trackers`.
    """
    check_log()
    check_machine(settings)
    check_output(settings)
    check_places(settings)
    check_trackers(settings)


def check_log() -> None:
    """Refuse a word in LALORA_LOG that nobody knows.

    Raises:
        ConfigError: naming the variable.
    """
    try:
        wants_json()
    except ValueError as wrong:
        raise ConfigError(str(wrong)) from None


def check_places(settings: Settings, *, data: bool = True) -> None:
    """Refuse files and folders that are not there; ``data``: also those of the records.

    Raises:
        ConfigError: naming the key.
    """
    kind, _, name = settings.model.name.partition("/")
    folder = expanded(name)
    whole = f"model.name = {settings.model.name!r}"
    if kind == "hf" and folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(f"{whole}: a folder needs config.json, the tokenizer's files and weights as safetensors")
    if kind == "hf" and not folder.is_dir() and (name.startswith(("/", "~", ".")) or name.count("/") > 1):
        raise ConfigError(f"{whole}: no such folder, and no name of a repository")
    if kind == "timm" and "/" in name and not (folder / "config.json").is_file():
        raise ConfigError(f"{whole}: timm has no such model and it is no folder with a config.json")
    if start := settings.lora.start_from:
        if not expanded(start).is_dir():
            raise ConfigError(f"lora.start-from = {start!r}: no such folder")
        weights_of(expanded(start))
    for key, value in (("data.name", settings.data.name), ("data.test", settings.data.test)):
        pattern = value.removeprefix("file:")
        if data and pattern != value and not _names_something(pattern):
            raise ConfigError(f"{key} = {pattern!r}: no such file or folder")


def _can_be_written(file: Path) -> bool:
    return not file.is_dir() and file.parent.is_dir() and os.access(file.parent, os.W_OK | os.X_OK)


def _names_something(pattern: str) -> bool:
    path = expanded(pattern)
    return path.exists() or next(glob.iglob(str(path), recursive=True), None) is not None


def check_output(settings: Settings) -> None:
    """Refuse a run folder that holds a run already or cannot be made, and a metrics file without a folder. Leaves nothing.

    Raises:
        ConfigError: naming the key.
    """
    if settings.run_name:
        folder_for(settings)
    if settings.metrics_file and not settings.resume and not _can_be_written(expanded(settings.metrics_file)):
        raise ConfigError(f"metrics-file = {settings.metrics_file!r}: must be a file in a folder that exists and can be written")
    check_folder(f"output-dir = {settings.output_dir!r}", expanded(settings.output_dir))


def check_folder(named: str, folder: Path) -> None:
    """Refuse a folder that cannot be made or written to. Leaves nothing.

    Args:
        named: how the user said it, for the message.
        folder: in which something is to be written.

    Raises:
        ConfigError: it cannot.
    """
    made: list[Path] = []
    try:
        for place in reversed([path := folder.absolute(), *path.parents]):
            if not place.exists():
                place.mkdir()
                made.append(place)
        if not os.access(path, os.W_OK | os.X_OK) or not path.is_dir():
            raise ConfigError(f"{named}: cannot be written")
    except OSError as error:
        raise ConfigError(f"{named}: {error.strerror}") from None
    finally:
        with suppress(OSError):  # another run has written there meanwhile
            for place in reversed(made):
                place.rmdir()


def without_hub(settings: Settings, reach: Callable[[], bool] | None = None, *, weights: bool = True) -> bool:
    """Whether the hub is needed and out of reach; libraries that are imported from now on then look into their caches at once.

    ``weights``: whether they are needed; some models can be planned without.

    Raises:
        ConfigError: the cache lacks the model.
    """
    if os.environ.get("HF_HUB_OFFLINE") or not _needs_hub(settings) or (reach or _reach_hub)():
        return False
    os.environ["HF_HUB_OFFLINE"] = "1"  # before its own library is imported, which looks here once
    kind, _, name = settings.model.name.partition("/")
    if kind == "hf" and weights and not expanded(name).exists() and not _cached(name, settings.model.revision):
        raise ConfigError(
            f"model.name = {settings.model.name!r}: the hub cannot be reached and its cache holds no {name}; put the model into "
            "a folder and name that"
        )
    return True


def _cached(repository: str, revision: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(repository, "config.json", revision=revision or None), str)
    except HFValidationError:
        raise ConfigError(f"model.name = 'hf/{repository}': no such folder, and no name of a repository") from None


def _needs_hub(settings: Settings) -> bool:
    kind, _, name = settings.model.name.partition("/")
    model = kind in ("hf", "timm") and settings.model.pretrained and not expanded(name).exists()
    return model or any(text.startswith("hub:") for text in (settings.data.name, settings.data.test))


def _reach_hub() -> bool:
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # only the proxy knows
    address = urlparse(os.environ.get("HF_ENDPOINT", HUB))
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        with socket.create_connection((address.hostname or "", port), timeout=HUB_SECONDS):
            return True
    except OSError:
        return False
