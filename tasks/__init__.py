"""Where problems come from: a source is a function (config, seed) -> (train problems, held-out
problems).

To add a dataset, write its row in datasets.py and name it in ROWS. To add a made task, write a file
like chain.py and name it in SOURCES; with a demonstrator and a tokenizer, a model from scratch can
learn it.
"""

from functools import partial

from tasks.chain import chain_problems, chain_solution, chain_tokenizer
from tasks.datasets import ROWS, dataset_problems
from tasks.gym import reasoning_gym_problems
from tasks.print_sum import print_problems, print_solution, print_tokenizer

SOURCES = {
    "chain": chain_problems,
    "print": print_problems,
    "reasoning_gym": reasoning_gym_problems,
}
SOURCES |= dict.fromkeys(ROWS, dataset_problems)
# For the warm start of a new model: (prompt, noise or None) -> text, and such texts' tokenizer
DEMONSTRATORS = {"chain": chain_solution, "print": print_solution}
TOKENIZERS = {"chain": chain_tokenizer, "print": print_tokenizer}
ASK_FOR_PROGRAM = (
    "{question}\n\n"
    "Put the whole program, imports included, in one block that begins with ```python."
)
ASK_FOR_BOX = (
    "{question}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
)
# What stands around the question, where it is not ASK_FOR_BOX. The second kind says it itself.
PROMPTS = dict.fromkeys(("humaneval", "leetcode", "livecodebench"), ASK_FOR_PROGRAM)
PROMPTS |= dict.fromkeys(("chain", "print", "file", "eurus", "eurus_math"), "{question}")


def demonstrator(config):
    """(prompt, noise or None) -> text, of the source's demonstrator with the config's settings."""
    settings = {"repeat_slip": config.repeat_slip} if config.source == "chain" else {}
    return partial(DEMONSTRATORS[config.source], **settings)
