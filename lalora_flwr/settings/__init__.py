"""Run-config keys: documented, typed, checked before any data is touched."""

from lalora_flwr.settings.data_keys import DataSettings
from lalora_flwr.settings.keys import Key, Kind, Value
from lalora_flwr.settings.privacy_keys import PrivacySettings
from lalora_flwr.settings.read import KEYS, check_values, flatten, keys_of, settings_again, settings_from, settings_kept
from lalora_flwr.settings.schema import LoraSettings, MergeSettings, ModelSettings, Settings
from lalora_flwr.settings.text import flatten_toml, parse_override, read_toml
from lalora_flwr.settings.train_keys import TrainSettings

__all__ = [
    "KEYS",
    "DataSettings",
    "Key",
    "Kind",
    "LoraSettings",
    "MergeSettings",
    "ModelSettings",
    "PrivacySettings",
    "Settings",
    "TrainSettings",
    "Value",
    "check_values",
    "flatten",
    "flatten_toml",
    "keys_of",
    "parse_override",
    "read_toml",
    "settings_again",
    "settings_from",
    "settings_kept",
]
