"""Configs: YAML and `key=value` into dataclasses, with an error that names the nearest key.

    python train.py [CONFIG.yaml] [key=value ...]

key=value overrides the YAML, the YAML its `base`, and that the defaults of the fields. A key is a block and a name in
it, `train.steps`. What a run wrote of its config is read back by `saved_config` and `saved_block`.
"""

import dataclasses
import difflib
import json
import math
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import yaml

from infra.errors import BadInput

ABSENT = "no such key"  # a config of another version of this code has keys more or less
CHANGEABLE = (  # what a resumed run may change: keys, or beginnings of keys
    *("run_dir", "resume", "overwrite", "dry_run", "eval."),
    *("model.gradient_checkpointing", "model.offload_reference", "sample.batch_tokens", "train.micro_batch_tokens"),
    *(
        "model.shard",
        "model.replicate",
        "train.steps",
        "train.save_every",
        "train.keep_checkpoints",
        "train.diagnose_every",
        "train.tensorboard",
        "train.dump_every",
        "train.timeout_minutes",
    ),
)
FREE_BLOCKS = ("model.scratch.", "reward.bonus.")  # whose keys are the user's: one that is missing is no other version


def require_at_least(least: int, config, *names: str) -> None:
    """For the checks of config blocks: ValueError names the first field below `least`."""
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{name}={getattr(config, name)} must be at least {least}")


def all_keys(cls, prefix: str = "") -> list[str]:
    """Every key of a config dataclass, dotted."""
    keys = []
    for name, kind in get_type_hints(cls).items():
        keys += all_keys(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else [prefix + name]
    return keys


def nearest_key(key: str, known: list[str]) -> str:
    """The known key that was most likely meant: by its last name, its initials (lr), its block and its spelling."""

    def likeness(candidate: str) -> float:
        (*block, name), (*other_block, other) = key.split("."), candidate.split(".")
        initials = "".join(word[0] for word in other.split("_"))
        spelling = difflib.SequenceMatcher(None, name, other).ratio()
        return max(spelling, 0.9 * (name == initials)) + 0.2 * (block == other_block)

    return max([*known, *{k.split(".")[0] for k in known}], key=likeness)


def typed(value, kind, key):
    """`value` as `kind`, or BadInput. YAML reads 1e-4 as text, so numbers may come as text where a float is due."""
    if get_origin(kind) is tuple:
        if isinstance(value, list | tuple) and len(value) == len(get_args(kind)):
            return tuple(typed(v, k, key) for v, k in zip(value, get_args(kind), strict=True))
    elif kind is float and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if math.isfinite(number):
            return number
    elif type(value) is kind:
        return value
    wanted = f"a list of {len(get_args(kind))} numbers" if get_origin(kind) is tuple else f"of type {kind.__name__}"
    raise BadInput(f"config: {key} must be {wanted}, not {value!r}")


def build_config(cls, values, known: list[str], prefix: str = ""):
    """A config dataclass from nested dicts; unknown keys and wrong types raise BadInput."""
    if not isinstance(values, dict):
        raise BadInput(f"config: {prefix.rstrip('.')} must hold keys and values, not {values!r}")
    kinds, built = get_type_hints(cls), {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in kinds:
            raise BadInput(f"config: unknown key {key!r}; the nearest is {nearest_key(key, known)!r}")
        nested = dataclasses.is_dataclass(kinds[name])
        built[name] = build_config(kinds[name], value, known, key + ".") if nested else typed(value, kinds[name], key)
    try:
        return cls(**built)
    except ValueError as error:  # a block's own check of its values
        raise BadInput(f"config: {prefix}{error}") from error


def read_yaml(path: Path, heirs: tuple[Path, ...] = ()) -> dict:
    """The values of a YAML file over those of its `base`, if it names one: a path from its own folder.

    `heirs` are the files that led here. Raises BadInput on a file that cannot be read, or is its own base.
    """
    chain = " -> ".join(map(str, (*heirs, path)))
    if path.resolve() in [heir.resolve() for heir in heirs]:
        raise BadInput(f"config: {path} is its own base: {chain}")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise BadInput(f"config: cannot read {chain}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"config: {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise BadInput(f"config: {path} must hold keys and values, not {values!r}")
    base = values.pop("base", "")
    if not isinstance(base, str):
        raise BadInput(f"config: base of {path} must be the path of another YAML, not {base!r}")
    return merged(read_yaml(path.parent / base, (*heirs, path)), values) if base else values


def merged(below, above):
    """`above` over `below`: nested dicts key by key, anything else whole."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {key: merged(below.get(key), value) for key, value in above.items()}


def read_config(cls, arguments: list[str], default: Path):
    """`[CONFIG.yaml] [key=value ...]` -> a `cls`: key=value overrides YAML, YAML its `base`, that the fields' defaults.

    Raises BadInput on a file that cannot be read, an unknown key, a wrong type, or what a block says of its own values.
    """
    overrides = [a for a in arguments if "=" in a]
    files = [a for a in arguments if "=" not in a]
    if len(files) > 1 or any(a.startswith(("-", "=")) for a in arguments):
        given = " ".join(arguments)
        raise BadInput(f"usage: [CONFIG.yaml] [key=value ...], no dashes, no spaces around '=', not {given!r}")
    path = Path(files[0]) if files else default
    values = read_yaml(path)
    for override in overrides:
        key, _, text = override.partition("=")
        *blocks, name = key.split(".")
        block = values
        for part in blocks:
            block = block.setdefault(part, {}) if isinstance(block, dict) else None
        if not isinstance(block, dict):
            raise BadInput(f"config: {override!r} goes through something that is no block")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise BadInput(f"config: cannot read the value of {override!r}") from error
        block[name] = "" if value is None else value
    config = build_config(cls, values, all_keys(cls))
    config.run_dir = config.run_dir or f"runs/{path.stem}"
    return config


def saved_config(folder: Path) -> dict:
    """What a run wrote of its config; {} where the folder holds no run. Raises BadInput where it cannot be read."""
    file = folder / "config.yaml"
    try:
        saved = yaml.safe_load(file.read_text()) if file.exists() else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInput(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    return saved if isinstance(saved, dict) and {"run_dir", "algorithm"} <= saved.keys() else {}


def saved_block(cls, config: dict, name: str):
    """Block `name` of a saved config, or its defaults. Raises BadInput where another version of this code wrote it."""
    try:
        return cls(**config.get(name, {}))
    except (TypeError, ValueError) as error:
        raise BadInput(
            f"the run's config.yaml holds a block {name!r} that this version of the code cannot read ({error}): "
            "check out the commit that its first lines name"
        ) from error


def plain(config) -> dict:
    """The config as YAML and JSON can hold it (lists for tuples)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flat(config: dict, prefix: str = "") -> dict:
    """Nested blocks as one dict with dotted keys."""
    items: dict = {}
    for key, value in config.items():
        items |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return items


def changes(saved: dict, config: dict) -> str:
    """`key: before -> now, ...` of what a resumed run may not change; empty if nothing."""
    sides, diff = (flat(saved), flat(config)), []
    for key in sides[0] | sides[1]:
        before, now = (side.get(key, None if key.startswith(FREE_BLOCKS) else ABSENT) for side in sides)
        if before != now and not key.startswith(CHANGEABLE):
            diff.append(f"{key}: {before} -> {now}")
    return ", ".join(diff)
