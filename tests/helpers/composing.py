"""Compose what Hydra has composed before from copies: it takes a fifth of a second each time, a copy a tenth of that.

What is shared are the files of `conf/`, and what the options of it that were chosen add up to. Overrides of single
values are parsed and applied anew, and so is all with another search path.
"""

from copy import deepcopy
from dataclasses import replace
from typing import Any

from hydra._internal import config_loader_impl, defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.defaults_list import DefaultsList, ResultDefault
from hydra._internal.hydra import Hydra
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig

_files: dict[str, ConfigResult | None] = {}
_choices: dict[tuple[Any, ...], DefaultsList] = {}
_sums: dict[tuple[Any, ...], DictConfig] = {}


def share() -> None:
    """Put shared results in place of three steps of Hydra: to read a file, to list the files of a choice, to merge.

    It composes once only: no more to ask for `hydra.mode` before, where no word sets it.
    """
    read = CachingConfigRepository.load_config
    embed = ConfigLoaderImpl._embed_result_config
    choose = config_loader_impl.create_defaults_list
    merge = ConfigLoaderImpl._compose_config_from_defaults_list
    interpolation_map = defaults_list._create_interpolation_map
    mode = Hydra.get_mode

    def read_once(repo: CachingConfigRepository, config_path: str) -> ConfigResult | None:
        if not _is_usual(repo):
            return read(repo, config_path)
        if config_path not in _files:
            _files[config_path] = read(repo, config_path)
        return _files[config_path]

    def embed_copy(file: ConfigResult, package: str | None) -> ConfigResult:
        result = embed(file, package)
        return replace(file, config=deepcopy(file.config)) if result is file else result

    def choose_once(
        repo: CachingConfigRepository, config_name: str, overrides_list: list[Override], **more: bool
    ) -> Any:
        if not _is_usual(repo):
            return choose(repo, config_name, overrides_list, **more)
        of_groups = [each for each in overrides_list if _chooses(each, repo)]
        key = (config_name, *(each.input_line for each in of_groups), *more.items())
        if key not in _choices:
            _choices[key] = choose(repo, config_name, of_groups, **more)
        of_values = [each for each in overrides_list if each not in of_groups and not each.is_sweep_override()]
        return replace(_choices[key], config_overrides=of_values)

    def merge_once(loader: Any, defaults: list[ResultDefault], repo: CachingConfigRepository) -> DictConfig:
        if not _is_usual(repo):
            return merge(loader, defaults, repo)
        key = tuple((each.config_path, each.package, each.is_self, each.primary) for each in defaults)
        if key not in _sums:
            _sums[key] = merge(loader, defaults, repo)
        return deepcopy(_sums[key])

    def map_where_needed(overrides: Any, listed: list[Any], self_added: bool) -> DictConfig | None:
        return interpolation_map(overrides, listed, self_added) if any(d.is_interpolation() for d in listed) else None

    def mode_where_set(hydra: Hydra, config_name: str, overrides: list[str]) -> Any:
        is_set = any("hydra.mode=" in word for word in overrides)
        return mode(hydra, config_name, overrides) if is_set else None

    CachingConfigRepository.load_config = read_once
    ConfigLoaderImpl._embed_result_config = staticmethod(embed_copy)
    config_loader_impl.create_defaults_list = choose_once
    ConfigLoaderImpl._compose_config_from_defaults_list = merge_once
    defaults_list._create_interpolation_map = map_where_needed
    Hydra.get_mode = mode_where_set


def _chooses(override: Override, repo: CachingConfigRepository) -> bool:
    """Whether this chooses an option of a group, as Hydra sees it."""
    return (
        not override.is_sweep_override()
        and repo.group_exists(override.key_or_group)
        and not isinstance(override.value(), dict)
    )


def _is_usual(repo: CachingConfigRepository) -> bool:
    """Whether all comes from where no test changes anything."""
    from espalier.config.conf_dir import CONF  # not before: copies of the fork server import the package themselves

    return {source.full_path() for source in repo.get_sources()} <= {
        "pkg://hydra.conf",
        f"file://{CONF}",
        "structured://",
    }
