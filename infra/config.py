"""Configs: YAML and `key=value` into dataclasses, with an error that names the nearest key.

    python train.py [CONFIG.yaml] [key=value ...]

key=value overrides the YAML, the YAML its `base`, and that the defaults of the fields. A key is a
block and a name in it, `train.steps`. What a run wrote of its config is read back by `saved_config`
and `saved_block`.

All that is to be known of a knob stands where it is declared, see `knob`.
"""

import dataclasses
import difflib
import json
import math
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from infra.errors import BadInput

ABSENT = "no such key"  # a config of another version of this code has keys more or less


def knob(
    default,
    help: str,
    *,
    least=None,
    above=None,
    choices: tuple = (),
    resume: bool = False,
    compared: bool = True,
    warm_start: bool = False,
    rounds: bool = False,
    lowers: dict[str, str] | None = None,
    free: bool = False,
):
    """A field of a config block: its default, and one line of help.

    least, above, choices: which values it takes. `resume`: a resumed run may change it, for it
    cannot touch the run's past. `compared`: runs that differ in it are not runs of one method
    (tools/report.py). `warm_start`: a warm start depends on it (tools/sweep.py). `rounds`: sums are
    rounded otherwise where it changes. `lowers`: {stage: what to do} where it makes a stage need
    less memory. `free`: a dict whose keys are the user's.
    """
    metadata = {
        "help": help,
        "least": least,
        "above": above,
        "choices": choices,
        "resume": resume,
        "compared": compared,
        "warm_start": warm_start,
        "rounds": rounds,
        "lowers": lowers or {},
        "free": free,
    }
    if isinstance(default, dict | list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def setting(default, help: str, **rules):
    """A knob that only places, saves, divides or reports the work: it may change on resume, and
    it compares nothing.
    """
    return knob(default, help, resume=True, compared=False, **rules)


class Block:
    """A block of the config: a dataclass of knobs. ValueError where a value is not one that its
    knob takes.
    """

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, rules = getattr(self, field.name), field.metadata
            if rules.get("least") is not None and value < rules["least"]:
                raise ValueError(f"{field.name}={value} must be at least {rules['least']}")
            if rules.get("above") is not None and value <= rules["above"]:
                positive = "positive" if rules["above"] == 0 else f"above {rules['above']}"
                raise ValueError(f"{field.name}={value} must be {positive}")
            if rules.get("choices") and value not in rules["choices"]:
                *others, last = map(str, rules["choices"])
                choices = f"{', '.join(others)} or {last}"
                raise ValueError(f"{field.name}={value!r}: choose {choices}")


# --- the keys -------------------------------------------------------------------------------------


def knobs(cls, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Every key of a config dataclass, dotted -> its field."""
    found, kinds = {}, get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = kinds[field.name]
        if dataclasses.is_dataclass(kind):
            found |= knobs(kind, f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = field
    return found


def all_keys(cls) -> list[str]:
    """Every key of a config dataclass, dotted."""
    return list(knobs(cls))


def keys_where(cls, rule: str) -> list[str]:
    """The keys whose knobs say `rule`: "resume", "compared", "warm_start", "rounds" or "free"."""
    defaults = {"compared": True}
    return [
        key
        for key, field in knobs(cls).items()
        if field.metadata.get(rule, defaults.get(rule, False))
    ]


def memory_advice(cls, stage: str) -> str:
    """What makes a stage need less memory, by the knobs that say so."""
    advice = [
        field.metadata["lowers"][stage]
        for field in knobs(cls).values()
        if stage in field.metadata.get("lowers", {})
    ]
    return ", or ".join(advice) or "give it less"


def help_lines(cls) -> list[str]:
    """`key = default`, and its line of help, for every key."""
    lines = []
    for key, field in knobs(cls).items():
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        lines.append(f"{key} = {default!r}\n      {field.metadata['help']}")
    return lines


def nearest_key(key: str, known: list[str]) -> str:
    """The known key that was most likely meant: by its last name, its initials (lr), its block
    and its spelling; of two as likely, train's.
    """

    def likeness(candidate: str) -> tuple[float, bool]:
        (*block, name), (*other_block, other) = key.split("."), candidate.split(".")
        initials = "".join(word[0] for word in other.split("_"))
        spelling = difflib.SequenceMatcher(None, name, other).ratio()
        alike = max(spelling, 0.9 * (name == initials)) + 0.2 * (block == other_block)
        return alike, other_block == ["train"]

    return max([*known, *{k.split(".")[0] for k in known}], key=likeness)


# --- reading --------------------------------------------------------------------------------------


def typed(value, kind, key: str):
    """`value` as `kind`, or BadInput. YAML reads 1e-4 as text, so numbers may come as text where
    a float is due.
    """
    if get_origin(kind) is tuple:
        if isinstance(value, list | tuple) and len(value) == len(get_args(kind)):
            return tuple(typed(v, k, key) for v, k in zip(value, get_args(kind), strict=True))
    elif kind is float and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    elif get_origin(kind) is list:
        if type(value) is list and all(type(item) in get_args(kind) for item in value):
            return savable(value, key)
    elif type(value) is kind:
        return savable(value, key)
    wanted = {
        tuple: f"a list of {len(get_args(kind))} numbers",
        list: 'a list of texts, as in ["a", "b"]',
    }.get(get_origin(kind)) or f"of type {kind.__name__}"
    quotes = "; in a YAML, put it in quotes" if kind is str else ""
    raise BadInput(f"config: {key} must be {wanted}, not {value!r}{quotes}")


def savable(value, key: str):
    """`value`, or BadInput where a run could not write it down and read the same back."""
    try:
        same = json.loads(json.dumps(value, ensure_ascii=False).encode())
    except (TypeError, ValueError, RecursionError):  # a date, half a character, a loop of anchors
        same = None
    if same != value:
        raise BadInput(
            f"config: {key} must hold texts, numbers and lists or blocks of them, not {value!r}"
        )
    return value


def build_config(cls, values, known: list[str], prefix: str = ""):
    """A config dataclass from nested dicts; unknown keys and wrong types raise BadInput."""
    if not isinstance(values, dict):
        raise BadInput(f"config: {prefix.rstrip('.')} must hold keys and values, not {values!r}")
    kinds, built = get_type_hints(cls), {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in kinds:
            raise BadInput(
                f"config: unknown key {key!r}; the nearest is {nearest_key(key, known)!r}"
            )
        nested = dataclasses.is_dataclass(kinds[name])
        built[name] = (
            build_config(kinds[name], value, known, key + ".")
            if nested
            else typed(value, kinds[name], key)
        )
    try:
        return cls(**built)
    except ValueError as error:  # a block's own check of its values
        raise BadInput(f"config: {prefix}{error}") from error


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML takes the last of two equal keys and drops the first without a word; a lost block
    ruins a run.
    """

    def compose_mapping_node(self, anchor):
        # Here, not where dicts are made: merging (`<<`) adds a second of what it means to override
        node = super().compose_mapping_node(anchor)
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if key in lines:  # as a dict has it: 1 and 1.0 are one key
                raise yaml.YAMLError(
                    f"key {key!r} stands twice, in lines {lines[key]} and {line}: make it one"
                )
            lines[key] = line
        return node


@contextmanager
def valid_yaml():
    """Where the block reads what is no YAML of plain values: yaml.YAMLError, and nothing else."""
    try:
        yield
    except yaml.YAMLError:
        raise
    except Exception as error:  # whatever int(), date() and dict() say of a value or a key
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from error


def parse_yaml(text: str):
    """Plain values alone: this loader makes no objects. Raises yaml.YAMLError."""
    with valid_yaml():
        return UniqueKeyLoader(text).get_single_data()


def parse_argument(text: str):
    """A value of the command line: what YAML reads, and to the letter what it reads as bare text
    or as a comment.
    """
    with valid_yaml():
        loader = UniqueKeyLoader(text)
        node = loader.get_single_node()
        value = None if node is None else loader.construct_document(node)
    is_bare_text = isinstance(value, str) and node.style is None
    return text if node is None or is_bare_text else value


def read_yaml(path: Path, heirs: tuple[Path, ...] = ()) -> dict:
    """The values of a YAML file over those of its `base`, if it names one: a path from its own
    folder.

    `heirs` are the files that led here. Raises BadInput on a file that cannot be read, or is its
    own base.
    """
    chain = " -> ".join(map(str, (*heirs, path)))
    try:
        if path.resolve() in [heir.resolve() for heir in heirs]:
            raise BadInput(f"config: {path} is its own base: {chain}")
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"config: cannot read {chain}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or no path
        reason = " ".join(str(error).split())
        raise BadInput(f"config: {path} is not valid YAML: {reason}") from error
    values = {} if values is None else values
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


def kind_of(cls, key: str):
    """The type of a dotted key; None where there is none."""
    for name in key.split("."):
        cls = get_type_hints(cls).get(name) if dataclasses.is_dataclass(cls) else None
    return cls


def override(values: dict, argument: str, cls) -> None:
    """Put `key=value` into nested dicts. The value of a text is taken to the letter, any other is
    read as YAML.
    """
    key, _, text = argument.partition("=")
    *blocks, name = key.split(".")
    block = values
    for part in blocks:
        block = block.setdefault(part, {}) if isinstance(block, dict) else None
    if not isinstance(block, dict):
        raise BadInput(f"config: {argument!r} goes through something that is no block")
    if kind_of(cls, key) is str:
        block[name] = text
        return
    try:
        block[name] = parse_argument(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise BadInput(f"config: cannot read the value of {argument!r}: {reason}") from error


def read_config(cls, arguments: list[str], default: Path):
    """`[CONFIG.yaml] [key=value ...]` -> a `cls`: key=value overrides YAML, YAML its `base`, that
    the fields' defaults.

    Raises BadInput on a file that cannot be read, an unknown key, a wrong type, or what a block
    says of its own values.
    """
    overrides = [a for a in arguments if "=" in a]
    files = [a for a in arguments if "=" not in a]
    if len(files) > 1 or any(a.startswith(("-", "=")) for a in arguments):
        given = " ".join(arguments)
        raise BadInput(
            f"usage: [CONFIG.yaml] [key=value ...], no dashes, no spaces around '=', not {given!r}"
        )
    path = Path(files[0]) if files else default
    values = read_yaml(path)
    for argument in overrides:
        override(values, argument, cls)
    config = build_config(cls, values, all_keys(cls))
    config.run_dir = config.run_dir or f"runs/{path.stem}"
    return config


# --- what a run wrote -----------------------------------------------------------------------------


def to_dict(config) -> dict:
    """The config as YAML and JSON can hold it (lists for tuples)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flat(config: dict, prefix: str = "") -> dict:
    """Nested blocks as one dict with dotted keys."""
    items: dict = {}
    for key, value in config.items():
        items |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        )
    return items


def saved_config(folder: Path) -> dict:
    """What a run wrote of its config; {} where the folder holds no run. Raises BadInput where it
    cannot be read.
    """
    file = folder / "config.yaml"
    try:
        saved = parse_yaml(file.read_text(encoding="utf-8")) if file.exists() else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInput(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    return saved if isinstance(saved, dict) and {"run_dir", "algorithm"} <= saved.keys() else {}


def saved_block(cls, config: dict, name: str):
    """Block `name` of a saved config, or its defaults. Raises BadInput where another version of
    this code wrote it.
    """
    try:
        return cls(**config.get(name, {}))
    except (TypeError, ValueError) as error:
        raise BadInput(
            f"the run's config.yaml holds a block {name!r} that this version of the code cannot "
            f"read ({error}): "
            "check out the commit that its first lines name"
        ) from error


def changes(saved: dict, config, rule: str = "") -> str:
    """`key: before -> now, ...` of what a resumed run may not change; empty if nothing.

    With a `rule`, of the keys whose knobs say that instead (see `keys_where`).
    """
    cls = type(config)
    may_change = set(keys_where(cls, "resume"))
    if rule:
        may_change = set(all_keys(cls)) - set(keys_where(cls, rule))
    # A key that is missing there is no other version
    free = tuple(f"{key}." for key in keys_where(cls, "free"))
    before, now = flat(saved), flat(to_dict(config))
    found = []
    for key in before | now:
        absent = None if key.startswith(free) else ABSENT
        old, new = before.get(key, absent), now.get(key, absent)
        if rule and ABSENT in (old, new):  # an earlier version did it as now
            continue
        if old != new and key not in may_change:
            found.append(f"{key}: {old} -> {new}")
    return ", ".join(found)
