"""Where problems come from: a source is a function (config, seed) -> (train problems, held-out
problems).

To add a dataset, write its row in datasets.py and name it in ROWS. To add a made task, write a file
like chain.py and name it in SOURCES and DEMONSTRATORS; with a tokenizer too, a model from scratch
can learn it, and with a trace its steps are verified.
"""

from functools import partial

from tasks.chain import chain_problems, chain_solution, chain_tokenizer, chain_trace
from tasks.datasets import ROWS, dataset_problems
from tasks.gym import reasoning_gym_problems
from tasks.print_sum import print_problems, print_solution, print_tokenizer
from tasks.words import words_problems, words_solution, words_trace

SOURCES = {
    "chain": chain_problems,
    "print": print_problems,
    "words": words_problems,
    "reasoning_gym": reasoning_gym_problems,
}
SOURCES |= dict.fromkeys(ROWS, dataset_problems)
# What a warm start learns from: (prompt, noise or None) -> text
DEMONSTRATORS = {"chain": chain_solution, "print": print_solution, "words": words_solution}
# Which steps of a response are right: (prompt, text) -> list of Step, see traces.py
TRACES = {"chain": chain_trace, "words": words_trace}
# Of the sources that a model from scratch can learn
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
PROMPTS |= dict.fromkeys(("chain", "print", "words", "file", "eurus", "eurus_math"), "{question}")
# What stands in front of a prompt where the model is told the answer, if it is not TELL_ANSWER
TELL_ANSWER = "The answer to what follows is {answer}.\n\n"
ANSWERS = {"chain": "#{answer};"}  # a task of 40 symbols, in which # is written before the answer


def demonstrator(config):
    """(problem, noise or None) -> text: of the source's demonstrator with the config's settings,
    or the solution that a dataset's row has.
    """
    if config.source not in DEMONSTRATORS:
        return lambda problem, noise: problem.solution
    settings = {"repeat_slip": config.repeat_slip} if config.source == "chain" else {}
    solve = partial(DEMONSTRATORS[config.source], **settings)
    return lambda problem, noise: solve(problem.prompt, noise)
