"""Tasks of the package reasoning-gym, by name."""

from infra.errors import BadInput, optional
from tasks.problem import MADE, Problem, split_problems


def reasoning_gym_problems(config, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Problems of the reasoning-gym task that data.path names; the reference is the entry that
    its scorer wants.
    """
    gym, size = (
        optional("reasoning_gym", "reasoning-gym"),
        (config.train_size or MADE) + config.held_out_size,
    )
    try:
        entries = list(gym.create_dataset(config.path, seed=seed, size=size))
    except (ValueError, TypeError, AssertionError) as error:
        raise BadInput(
            f"data.path={config.path!r} is no reasoning-gym task that works by name ({error})"
        ) from error
    return split_problems(
        [Problem(entry["question"], entry, "reasoning_gym") for entry in entries], [], config
    )
